// Package backup is the session manager that keeps each session on its owner, the
// node that used it last, and on a few others. Which ones follows from the key of
// the session and the members of the group, so every node knows whom to ask, and
// a member that comes or goes moves only its own share of the sessions.
//
// When the owner dies one of the copies takes over, and the missing copy is made
// elsewhere. A request on another node moves the session there. After a split two
// nodes may own a session: the one of the later move stays the owner, or, of moves
// that were made independently, the greater node; what both know is merged.
//
// The engine, with its protocol and guarantees, is package replica. This package
// imports channel, core and replica; it must not import interceptors, valves, fx,
// go-plugin, grpc or the network.
package backup
