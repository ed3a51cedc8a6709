// Package replica is the engine of the managers that keep sessions in the memory
// of the nodes: delta, with every session on every node, and backup, with a few
// copies of each. What distinguishes them is Config.Copies.
//
// # Changes
//
// A change goes to the other nodes that have the session, as the bytes that the
// session table has encoded. Merging makes the order of arrival irrelevant, so a
// state transfer needs no pause and a change may be sent twice. A node that gets
// a change of a session of which it has nothing asks the sender for the rest.
//
// # Members
//
// Only an answer of the manager on the other side proves that a member is alive:
// the kernel of a stopped process still accepts connections. A member from which
// nothing was heard for FaultGrace, or that has not acknowledged a change in that
// time, is put aside: nothing is sent to it and nobody waits for it. It is asked
// for a sign of life meanwhile, and when it answers the two compare what they
// have. A member that never answered does not run this manager.
//
// # Coming together
//
// Two managers compare what they should both have by an exchange: one sends
// digests (a hash of each key and of its versions), the other sends back what is
// missing or different, and asks for what it lacks itself. The same exchange
// serves a joining node, which divides the ranges of keys among all members that
// have complete state, a manager that was restarted, two halves of a group after
// a split, members that were put aside, and a check of one other member every
// SyncInterval.
//
// # Placement
//
// With Copies, a session has an owner, which is the node that used it last, and
// copies on the first members of a ranking that every node can compute: rendezvous
// hashing of the session's key, members of different domains first. So a node
// that does not have a session knows whom to ask, and a member that comes or goes
// moves only the sessions that it takes or leaves. Ownership has a number that
// grows with each move; the higher number wins, of equal ones the greater node,
// so after a split one of two owners gives way, and what it knows is merged.
//
// Every record that travels says who owns the session and who has it. Whoever
// knows of more nodes that use it passes the change on to them, and acknowledges
// it after that.
//
// # The end
//
// What has ended leaves a tombstone, so that no node brings it back. It is kept
// for TombstoneTTL, and at least as long as a forgotten replica of that session
// could live somewhere (its time to live plus ExpireSlack; a day for sessions
// without one). A node that was cut off for longer than that, and on which the
// session went on being used, brings it back. The node on which a session is live
// ends it with a tombstone. A replica that nobody has used for its time to live
// plus ExpireSlack is dropped without one: all nodes do that by themselves, and a
// node that still uses the session sends the replica again.
//
// Locks: Manager.mu and a shard's lock are never held together, and none across a
// call of the host.
//
// The package imports channel, core and core/session; it must not import
// interceptors, valves, fx, go-plugin, grpc or the network.
package replica
