package core

import "fmt"

// ParseLevel is the inverse of Level.String.
func ParseLevel(s string) (Level, error) {
	for _, l := range []Level{Async, Acked, Synced} {
		if s == l.String() {
			return l, nil
		}
	}
	return Async, fmt.Errorf("core: level %q: use async, ack or sync", s)
}
