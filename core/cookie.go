package core

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/longhouse-go/longhouse/core/session"
)

// maxRequestedIDs bounds how many different session ids of one request are
// tried; a browser sends two or three at most (one per cookie path).
const maxRequestedIDs = 8

// requestedID is a session id that the client presented.
type requestedID struct {
	raw, id, route string
	cookie         bool
}

// cookieValue returns the value of the first cookie of that name in the line
// and what follows it. It allocates nothing.
func cookieValue(line, name string) (value, rest string, ok bool) {
	for line != "" {
		var pair string
		pair, line, _ = strings.Cut(line, ";")
		pair = strings.Trim(pair, " \t")
		if len(pair) > len(name) && pair[len(name)] == '=' && pair[:len(name)] == name {
			value = pair[len(name)+1:]
			if n := len(value); n >= 2 && value[0] == '"' && value[n-1] == '"' {
				value = value[1 : n-1]
			}
			return value, line, true
		}
	}
	return "", "", false
}

// CookieValues returns the values of the request's cookies of that name, the
// first ones if there are more than most. It looks at nothing else, however many
// cookies there are.
func CookieValues(r *http.Request, name string, most int) (values []string) {
	for _, line := range r.Header["Cookie"] {
		for {
			value, rest, ok := cookieValue(line, name)
			if !ok {
				break
			}
			if len(values) == most {
				return values
			}
			values = append(values, value)
			line = rest
		}
	}
	return values
}

// presentCookies notes the session ids in the request's cookies.
func (x *Exchange) presentCookies(lines []string) {
	for _, line := range lines {
		for {
			value, rest, ok := cookieValue(line, x.context.tracking.Cookie)
			if !ok {
				break
			}
			if !x.present(value, true) {
				return
			}
			line = rest
		}
	}
}

// present notes a session id, if it has the form of one. It is false when
// there are too many.
func (x *Exchange) present(raw string, cookie bool) bool {
	id, route, ok := session.ParseID(raw)
	if !ok {
		x.engine.metrics.badIDs.Inc()
		return true
	}
	r := requestedID{raw, id, route, cookie}
	if x.requested.raw == "" {
		x.requested = r
		return true
	}
	if x.requested.raw == raw {
		return true
	}
	for _, other := range x.alsoRequested {
		if other.raw == raw {
			return true
		}
	}
	if len(x.alsoRequested) == maxRequestedIDs-1 {
		x.engine.metrics.manyIDs.Inc()
		return false
	}
	x.alsoRequested = append(x.alsoRequested, r)
	return true
}

// setCookie adds the session cookie to the response header.
func (x *Exchange) setCookie(id string) {
	t := &x.context.tracking
	b := make([]byte, 0, 160)
	b = append(append(append(b, t.Cookie...), '='), id...)
	b = append(append(b, "; Path="...), t.CookiePath...)
	if t.CookieDomain != "" {
		b = append(append(b, "; Domain="...), t.CookieDomain...)
	}
	if x.Secure() || t.SameSite == http.SameSiteNoneMode { // browsers refuse None without Secure
		b = append(b, "; Secure"...)
	}
	b = append(b, "; HttpOnly"...)
	switch t.SameSite {
	case http.SameSiteStrictMode:
		b = append(b, "; SameSite=Strict"...)
	case http.SameSiteNoneMode:
		b = append(b, "; SameSite=None"...)
	default:
		b = append(b, "; SameSite=Lax"...)
	}
	x.out.w.Header().Add("Set-Cookie", string(b))
}

// encodeURL puts the id behind the path of a reference to the context's own
// pages; see Exchange.EncodeURL.
func (x *Exchange) encodeURL(ref, id string) string {
	u, err := url.Parse(ref)
	if err != nil || u.Opaque != "" || (ref != "" && ref[0] == '#') {
		return ref
	}
	if u.Host != "" && (hostName(u.Host) != hostName(x.request.Host) || (u.Scheme != "" && u.Scheme != x.Scheme())) {
		return ref
	}
	if u.Host == "" && u.Scheme != "" { // mailto: and the like
		return ref
	}
	path := u.EscapedPath()
	switch {
	case path == "" && u.Host == "": // "?page=2" refers to this page; a path of its own must name it
		path = x.original.EscapedPath()
		ref = path + ref
	case path == "":
		return ref
	case strings.HasPrefix(path, "/") && !under(path, x.context.escapedPath):
		return ref
	}
	param := x.context.param + "="
	if i := strings.Index(strings.ToLower(path), ";"+param); i >= 0 {
		return ref
	}
	cut := len(ref)
	if i := strings.IndexAny(ref, "?#"); i >= 0 {
		cut = i
	}
	return ref[:cut] + ";" + param + id + ref[cut:]
}

// under reports whether path is prefix or below it, on a segment boundary.
func under(path, prefix string) bool {
	return strings.HasPrefix(path, prefix) &&
		(len(path) == len(prefix) || path[len(prefix)] == '/' || path[len(prefix)] == ';')
}
