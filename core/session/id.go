package session

import (
	"crypto/rand"
	"encoding/hex"
	"strings"
)

// Bounds of session ids, in bytes.
const (
	// idRandom is how many random bytes an id has: 128 bits, as Tomcat.
	idRandom = 16
	// MinID and MaxID bound the ids of clients; Tomcat's sessionIdLength can
	// make them longer than ours.
	MinID = 2 * idRandom
	MaxID = 128
	// MaxRoute bounds the route.
	MaxRoute = 64
	// prefixLen is how much of an id logs show.
	prefixLen = 8
)

// NewID returns a fresh id: 32 upper-case hexadecimal digits, 128 random bits.
func NewID() string {
	var raw [idRandom]byte
	_, _ = rand.Read(raw[:]) // never fails, see crypto/rand
	var digits [2 * idRandom]byte
	hex.Encode(digits[:], raw[:])
	for i, c := range digits {
		if c >= 'a' {
			digits[i] = c - ('a' - 'A')
		}
	}
	return string(digits[:])
}

// ParseID splits what a client sent into the id and the route behind the first
// dot. It refuses (ok is false) everything that no node would have made: an id
// that is not 32 to 128 upper-case hexadecimal digits, or a route that is empty
// behind a dot, longer than 64 bytes, or has other characters than letters,
// digits, dot, dash and underscore.
func ParseID(raw string) (id, route string, ok bool) {
	if len(raw) > MaxID+1+MaxRoute {
		return "", "", false
	}
	id, route, dotted := strings.Cut(raw, ".")
	if len(id) < MinID || len(id) > MaxID || len(route) > MaxRoute || dotted && route == "" {
		return "", "", false
	}
	for i := range len(id) {
		if c := id[i]; (c < '0' || c > '9') && (c < 'A' || c > 'F') {
			return "", "", false
		}
	}
	for i := range len(route) {
		if !routeByte(route[i]) {
			return "", "", false
		}
	}
	return id, route, true
}

func routeByte(c byte) bool {
	switch {
	case c >= '0' && c <= '9', c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z':
		return true
	}
	return c == '.' || c == '-' || c == '_'
}

// Prefix returns the beginning of an id, for logs: enough to recognise a
// session, too little to take it over.
func Prefix(id string) string {
	if len(id) <= prefixLen {
		return id[:len(id)/2] + "…"
	}
	return id[:prefixLen] + "…"
}
