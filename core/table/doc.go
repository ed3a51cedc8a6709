// Package table is the session table of a node: the living sessions that the
// node works on, in its own memory. Finding and reading a session is a map
// lookup; changes are collected per session and handed to the manager in
// batches, so that no request costs a call.
//
//	Find ─► live session ◄── Update (changes by other nodes)
//	            │ pending change, one record per session
//	            ▼ Commit, Release
//	        flusher per level ──► Manager.Commit(batch), one in flight
//
// Locks: a shard's lock may be held when a session's is taken, and a session's
// when a flusher's is taken; never the other way round, and none across a call
// of the manager or of the application.
//
// It imports core, core/session and channel; it must not import interceptors,
// valves, plugins, fx, the container or the network.
package table
