// Package tcp brings messages to other nodes over TCP, in the bytes of Apache
// Tribes: a [Sender] and a [Receiver] for the bottom of a channel.
//
// Tribes acknowledgements carry no id, they are matched by order. Toward a peer
// whose announcement says Pipelined the Sender therefore keeps one connection
// with a window of unacknowledged messages. Toward any other peer, which may
// process two reads of one connection at once, it keeps a pool of connections
// with one unacknowledged message each, and one more for messages that nobody
// waits for.
//
//	Send ──► pipe ──► one connection, many messages in flight     (Longhouse)
//	     └─► pool ──► n connections, one message each             (Tribes)
//	              └─► pipe for messages without acknowledgement
//
// The package imports package channel, channel/wire, zap and the root package
// of pion/transport. It must not reach the network except through
// channel.Settings.Net, and holds no mutex across I/O.
package tcp
