// Package sdk is the author's side of plugins that run as processes of their
// own: it serves interceptors, managers, memberships and deployers to a
// Longhouse node.
//
//	func main() { sdk.Main(sdk.Interceptor("acme/zip", "1.2.0", zip.New)) }
//
// The node starts the program as "<program> plugin serve <kind>/<name>", and
// "<program> describe" says what it is. A
// plugin is ordinary code behind the interfaces of channel and core; it can be
// compiled into a node and called directly without any change. What is special
// in a process of its own:
//
//   - the logger of channel.Settings writes to the node's log; what is printed
//     appears there at debug level;
//   - the environment is empty but for a few names, the working directory is
//     private and temporary, standard input is empty;
//   - the process may be killed and started again at any time. Calls that it
//     had not answered are made again by the node, so they must be idempotent,
//     which the interfaces demand anyway;
//   - messages of an interceptor that it had not decided about are given to the
//     successor, in their order; what it has sent of its own before it died may
//     be sent again;
//   - passing on the message of a handler (Link.Send, Link.Deliver) returns nil
//     at once: the result takes its way around the handler. Who needs it sets
//     Message.Done, or passes on a copy of the message, which is waited for;
//   - a handler that panics ends the process;
//   - when the node is gone, the component is stopped and the process ends
//     within two seconds.
//
// The package must not import package plugins, interceptors, valves or fx.
package sdk
