package core

import (
	"net/url"
	"strings"
)

// A request path is looked at in two ways. Nearly all are plain: no parameters,
// no percent-encoding that matters, nothing to clean; they are used as they
// are. Everything else is taken apart into segments, so that nobody is fooled
// by ..;x, %2e%2e or an encoded slash.

// maxSegments bounds the segments of a path that has to be taken apart.
const maxSegments = 1024

// segment is one piece of a path between slashes, still encoded.
type segment struct {
	// name is the encoded text before the first parameter.
	name string
	// params is the encoded rest with its semicolons, or empty.
	params string
	// plain is name decoded, with encoded slashes as NUL, so that it equals a
	// segment of a context path only if it was written as one.
	plain string
}

// plainPath reports whether p (with no raw form of its own) can be used as it
// is: absolute, without parameters, dot segments, empty segments, backslashes
// and NULs.
func plainPath(p string) bool {
	if p == "" || p[0] != '/' {
		return false
	}
	for i := range len(p) {
		switch p[i] {
		case ';', '\\', 0:
			return false
		case '/':
			if i+1 < len(p) && (p[i+1] == '/' || p[i+1] == '.') {
				return false
			}
		}
	}
	return true
}

// splitPath takes an encoded path apart. Empty and single-dot segments are
// dropped, a double dot drops the segment before it. ok is false for a path
// that nobody writes in good faith: not absolute, above the root, a NUL, a
// backslash, or dots hidden behind an encoded slash or a parameter. dir tells
// whether the path ends in a slash or dots.
func splitPath(escaped string) (segs []segment, dir, ok bool) {
	if escaped == "" {
		return nil, true, true
	}
	if escaped[0] != '/' || strings.Count(escaped, "/") > maxSegments {
		return nil, false, false
	}
	for raw := range strings.SplitSeq(escaped[1:], "/") {
		name, params, has := raw, "", false
		if i := strings.IndexByte(raw, ';'); i >= 0 {
			name, params, has = raw[:i], raw[i:], true
		}
		plain, err := url.PathUnescape(name)
		if err != nil || strings.ContainsAny(plain, "\\\x00") {
			return nil, false, false
		}
		if p, err := url.PathUnescape(params); err != nil || strings.ContainsAny(p, "/\\\x00") {
			return nil, false, false
		}
		if hidden, _, semi := strings.Cut(plain, ";"); semi && (hidden == "." || hidden == "..") {
			return nil, false, false
		}
		dir = false
		switch plain {
		case "":
			// An empty last segment may carry parameters: /shop/;jsessionid=x.
			// They move to the segment before it, or to the root.
			if has {
				segs = append(segs, segment{params: params})
			}
			dir = true
			continue
		case ".", "..":
			if has {
				return nil, false, false
			}
			dir = true
			if plain == ".." {
				if len(segs) == 0 {
					return nil, false, false
				}
				segs = segs[:len(segs)-1]
			}
			continue
		}
		if strings.Contains(plain, "/") {
			for part := range strings.SplitSeq(plain, "/") {
				if part == "." || part == ".." {
					return nil, false, false
				}
			}
			plain = strings.ReplaceAll(plain, "/", "\x00")
		}
		segs = append(segs, segment{name, params, plain})
	}
	return segs, dir, true
}

// takeParam removes all parameters of that name (letter case ignored) from the
// segments and returns the values, encoded.
func takeParam(segs []segment, name string) (values []string) {
	for i := range segs {
		if segs[i].params == "" {
			continue
		}
		var kept strings.Builder
		for p := range strings.SplitSeq(segs[i].params[1:], ";") {
			key, value, _ := strings.Cut(p, "=")
			if strings.EqualFold(key, name) {
				values = append(values, value)
				continue
			}
			kept.WriteByte(';')
			kept.WriteString(p)
		}
		segs[i].params = kept.String()
	}
	return values
}

// joinPath is the inverse of splitPath.
func joinPath(segs []segment, dir bool) string {
	var b strings.Builder
	open := false // the last byte written is a slash
	for _, s := range segs {
		if s.name == "" && s.params == "" {
			continue
		}
		if !open {
			b.WriteByte('/')
		}
		b.WriteString(s.name)
		b.WriteString(s.params)
		open = false
	}
	if dir && !endsInParams(segs) || b.Len() == 0 {
		b.WriteByte('/')
	}
	return b.String()
}

// endsInParams reports whether the last segment has parameters but no name, as
// in /shop/;v=2: no further slash belongs behind it.
func endsInParams(segs []segment) bool {
	if len(segs) == 0 {
		return false
	}
	last := segs[len(segs)-1]
	return last.name == "" && last.params != ""
}

// plainSegments joins the plain names, for finding the context.
func plainSegments(segs []segment) string {
	var b strings.Builder
	for _, s := range segs {
		if s.plain == "" {
			continue
		}
		b.WriteByte('/')
		b.WriteString(s.plain)
	}
	return b.String()
}

// hostName returns the name in a Host header in lower case: without port,
// brackets and final dot.
func hostName(host string) string {
	if strings.HasPrefix(host, "[") {
		if i := strings.IndexByte(host, ']'); i > 0 {
			return strings.ToLower(host[1:i])
		}
	} else if i := strings.IndexByte(host, ':'); i >= 0 && i == strings.LastIndexByte(host, ':') {
		host = host[:i] // more colons are an address without brackets
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}
