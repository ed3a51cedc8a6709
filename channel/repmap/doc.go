// Package repmap is a map that the members of a group share.
//
//	m, err := repmap.New[string, Cart](ch, "carts", repmap.DefaultConfig(), settings)
//	err = m.Start(ctx)
//	err = m.Put(ctx, "1234", cart)
//
// A full map has a copy of every value on every member. A lazy map has it on
// two: the primary, which is who wrote it last, and a backup, which is chosen
// among the others by rendezvous hashing of the key; the rest know where it is.
//
// Every record has a stamp: a version (counter and writer) and a place (epoch
// and primary). Of two records of one key the one with the greater stamp wins,
// whole and everywhere. So after any split all members agree on one value and
// one primary. Of two writes at the same time the later one by counter, and
// then by the writer's id, stays. A removal is a record too, a tombstone, and
// is kept for Config.TombstoneTTL: a split that is shorter brings nothing back.
//
// Members compare digests of 256 parts of the map when they meet, and now and
// then; what differs is transferred in chunks, keys and stamps first and then
// only the values that are needed. A transfer goes on with another member when
// the first one dies.
//
// With Config.Tribes the map also talks to AbstractReplicatedMap of Apache
// Tribes; see there.
//
// The package imports channel, channel/rpc and channel/wire/jser. It must not
// import core, interceptors, valves or plugins.
package repmap
