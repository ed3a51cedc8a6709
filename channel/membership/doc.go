// Package membership is the pure core of memberships that hear heartbeats: a
// table of who has been heard, when, and what of it is news. It does no I/O,
// starts no goroutine and reads no clock: time is an argument.
//
// Heartbeats need not be authenticated, and of those that are not the table
// believes little:
//
//   - A record counts as life only if the alive time in it goes on. Duplicates
//     and replays of old records refresh nobody and bring nobody back. A member
//     whose clock was set back is believed again when its records go on in step
//     with this node's clock.
//   - Newcomers are taken in at once only at a bounded rate and number. Beyond
//     that they must be heard twice. They never push out a member.
//   - A newcomer that claims the address of a member waits until that has
//     fallen silent.
//
// A member that was heard with proof of its sender is changed by such records
// only; see [Table.HeardSealed].
//
// It imports the standard library and package channel, and must not import
// anything else.
package membership
