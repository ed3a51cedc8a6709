// Package memcached is the session manager that keeps sessions in memcached
// servers, as memcached-session-manager does for Tomcat: a session is on one
// server, with a copy on the next one, and on the failover servers when no
// other is left. The manager itself is plugins/manager/stored.
//
// # Placement
//
// Every session has its own order of the servers (rendezvous hashing), so that
// the sessions of a lost server spread evenly over the others and no other
// session moves. The first server of the order that answers decides who may
// write (compare and swap); the next one that answers has the copy, whose key
// begins with "bak:". A server that comes back empty, or with what it had long
// ago, is found out by the version in each item: the newest wins.
//
// # Keys
//
//	<prefix><8 hex digits of SHA-256 of the context>_<id>
//
// The id is that of the session without the route. Values begin with the version
// and the expiry (8 bytes each, big endian); nothing of Java is read or written.
//
// The package must not import interceptors, valves, fx, go-plugin or grpc.
package memcached
