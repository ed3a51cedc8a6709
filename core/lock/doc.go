// Package lock gives a session to one request at a time, on all nodes of a
// group.
//
// Two members vote for each session: the first two of all members of the view,
// ordered by a hash of member and session (rendezvous hashing), so that the work
// is spread evenly and few sessions change hands when the view changes. A
// request has the session when both have granted it, asked in that order, so
// that two requests never wait for each other in a circle. Each voter has a
// queue per session, first come, first served.
//
//	request ──acquire──► first voter ──granted──► second voter ──granted──► works, commits
//	        ◄─ when the one before gives it back, or its lease is over ─
//
// One voter may die at any time: the other one still knows who has the session.
// A node that has a session, or waits for it, tells the voters twice a second
// that it is alive, and they confirm it. Whatever a dead or frozen node had is
// free when it has been silent for two seconds, or when the lease of the request
// is over, counted by the voter from when it heard and by the holder from before
// it spoke: the holder's time always ends first. Because its clock is all that a
// holder needs to know that it is too late, a node that was frozen, or cut off,
// does not report success after somebody else got the session, nor before the
// voters have answered it lately: its changes may be stored nowhere else. What it may still
// write is beaten by its successor: that one skips the versions which its
// predecessor could have used. Voters are asked in an order that all nodes agree
// on, also while the view changes: who has to ask an earlier one gives back what
// later ones have granted. A node that comes back under its old address with a
// new identity has surely ended before: what it had is free at once.
//
// A voter tells those who have become voters who holds what. If both voters of a
// session go within two seconds, or both are replaced in one change of the view
// and this news is late, two requests can have a session at a time; then the
// usual merging decides, and conflicts are counted. The two sides of a split
// have voters of their own: on both sides requests go on, one at a time on each,
// and what both have changed is merged when the split heals.
//
// The package imports core, core/session and channel; it must not import the
// container, managers, interceptors, valves, plugins or the network.
package lock
