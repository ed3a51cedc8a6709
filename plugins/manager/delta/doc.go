// Package delta is the session manager that keeps every session on every node.
// A change goes to all members as the same bytes that the session table encoded;
// merging makes the order of arrival irrelevant, so a state transfer needs no
// pause and a change may be sent twice.
//
// # Coming together
//
// Two managers compare what they have by an exchange: one sends digests (a hash
// of each key and of its versions), the other sends back what is missing or
// different, and asks for what it lacks itself. The same exchange serves a
// joining node (it has nothing, so it gets everything), a manager that was
// restarted, two halves of a group after a split, members that a change could
// not be sent to, and a check of one other member every SyncInterval.
//
// # Tombstones
//
// What has ended leaves a tombstone, so that no node brings it back. It is kept
// for TombstoneTTL, and at least as long as a forgotten replica of that session
// could live somewhere (its time to live plus ExpireSlack; a day for sessions
// without one). A node that was cut off for longer than that, and on which the
// session went on being used, brings it back.
//
// # Expiry
//
// The node on which a session is live ends it with a tombstone. A replica that
// nobody has used for its time to live plus ExpireSlack is dropped without one:
// all nodes do that by themselves, and a node that still uses the session sends
// the replica again.
//
// The package imports channel, core and core/session; it must not import
// interceptors, valves, fx, go-plugin, grpc or the network.
package delta
