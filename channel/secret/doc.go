// Package secret holds what the nodes of a cluster share and nobody else may
// know: text that never prints, the rules for reading it from options,
// environment and files, and the keys that are derived from it.
//
// It imports the standard library only, and must not import anything else.
package secret
