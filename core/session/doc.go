// Package session is what a session is: the interface that applications use,
// the record with its versions, the rule that merges two histories of one
// session, and the encoding that travels between nodes. It is pure: no I/O, no
// goroutine, no clock; times are arguments. It imports the standard library and
// CBOR only.
package session
