// Package rpc is request and reply over a channel: one call asks any number of
// members and waits for the first answer, for those of the majority, or for
// all.
//
//	r, err := rpc.New(ch, "cache", handler, rpc.DefaultConfig(), settings)
//	replies, err := r.Call(ctx, ch.View().Members, rpc.Bytes(key), rpc.First, 0)
//
// An RPC has a name, and meets those of the same name on the other members. A
// member that has none says so at once, one that leaves the group ends the wait
// for it, and one that a request does not reach ends it with the reason.
//
// Between Longhouse nodes a call is a byte message with a fixed header. Tribes'
// nodes get, and give, an RpcMessage as a Java object; a request that came in
// that form is answered in it.
//
//	native   "LHR" 1 · u8 kind · u8 n · 8 bytes caller · u64 number ·
//	         u32 milliseconds the caller waits, 0 for ever · n bytes name · body
//
// The package imports channel and channel/wire/jser. It must not import core,
// interceptors, valves or plugins.
package rpc
