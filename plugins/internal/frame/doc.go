// Package frame is the data plane between a node and a plugin: length-prefixed
// frames on any ordered byte stream (a socket pair, an in-memory pipe, a gRPC
// stream), and on top of them a symmetric call protocol with correlation ids,
// one-way events, cancellation, bounded windows and replay.
//
//	u32 length of what follows
//	u64 seq       correlation id of a call and its reply
//	u8  kind      what is called; kinds from 0xf0 belong to this package
//	u8  verdict   of a reply: pass, replace, …, error
//	u16 flags     FlagReply, FlagEvent
//	u32 options   free for the kind
//	…   payload
//
// All numbers are big-endian. What one side sends arrives in the order in which
// it was sent, replies and events included.
//
// The package knows nothing of plugins. It imports the standard library,
// golang.org/x/sync and channel (for its errors), and must not import core,
// go-plugin or grpc.
package frame
