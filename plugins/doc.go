// Package plugins hosts managers, memberships, deployers and interceptors: it
// makes instances of them by name, in the node's own process or in a process of
// their own, and watches over those processes. What it returns implements the
// same interface as the plugin itself; callers cannot tell where it runs.
//
// A process is started with an empty environment, in its own process group and
// private directory, and is asked nothing that it could use against the node:
// its handshake is checked before go-plugin sees it, its output is read with
// bounds and never by go-plugin, its calls are limited in number and size.
// When it dies, hangs or breaks the protocol it is killed with everything that
// it has started, and a successor is started at once. Calls that were not
// answered are made again, in their order, so that callers see a pause and no
// failure. A process that keeps dying is started more and more slowly, and
// finally declared broken: calls then fail at once with channel.ErrPluginDown,
// until a later attempt succeeds.
//
// Authors of plugins need package plugins/sdk, not this one. This package must
// not import the plugins themselves (they are handed to it as factories),
// interceptors, valves or fx.
package plugins
