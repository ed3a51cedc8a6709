// Package scaffold writes the folder that the author of a plugin begins with: a
// component that does something, its test with the conformance suite, a program
// around it, a README of fixed headings and a go.mod that works without a
// network. The folders are templates, which the package's tests build, vet and
// test. It imports nothing of this module.
package scaffold
