// Package stored is the session manager around a core.Store: sessions live in
// the nodes' tables, and a place outside of the nodes keeps them. Whoever has
// such a place implements core.Store and gets the rest from here:
//
//	table ──commit──► pending, merged per session ──batches──► Store.Save (compare and swap)
//	                                                    │ conflict: Load, merge, again
//	                                                    ▼
//	                          notice to the other nodes ──► their live copies
//
// # What is promised
//
// A commit at level async is in this process, and in the store soon (see
// Config.Delay); at level ack it is in the store; at level sync the live copies
// of the other nodes have it too. Two nodes that change one session at the same
// time merge: the store only ever takes a change that was made on top of what
// it has.
//
// A store that fails stops nobody who has the session: changes wait here,
// bounded, and are written when it is back. What a request that waits for the
// store gets meanwhile says Config.OnFailure.
//
// The package imports channel, core and core/session; it must not import
// interceptors, valves, fx, go-plugin, grpc, the network or a driver.
package stored
