//go:build race

package tcp

// The race detector makes sync.Pool forget on purpose.
const raceDetector = true
