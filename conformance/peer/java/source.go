// Package java holds the Java programs that are compiled where peers of Apache
// Tribes are at hand. It imports nothing.
package java

import _ "embed" // for Bench

// Bench is the source of a Tribes node that is measured.
//
//go:embed Bench.java
var Bench string
