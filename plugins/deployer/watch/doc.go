// Package watch is the deployer that watches a local folder. An archive that
// appears there is put into service, one that changes replaces its
// predecessor, and one that disappears is taken out of service.
//
//	shop.war        /shop        .zip is the same
//	ROOT.war        the root context
//	a#b.war         /a/b
//	shop##2.war     /shop, version 2; the highest version present is served
//
// An archive is taken up when it has not changed for a while, copied, hashed,
// checked, unpacked into a directory of its own, and only then handed to the
// node. A predecessor stays until its successor serves. What is deployed is
// written down before and after, so that a deployer that was killed goes on
// where it stopped and leaves nothing behind.
//
// It imports core, channel and fsnotify, and must not import interceptors,
// valves, fx, go-plugin or grpc.
package watch
