package accesslog

import (
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/longhouse-go/longhouse/core"
)

// maxField bounds each field that comes from the client, in bytes.
const maxField = 2048

// shownID is how much of a session id in an address is shown, in bytes.
const shownID = 8

// entry is what a line is made of.
type entry struct {
	x              *core.Exchange
	r              *http.Request
	stamp          string
	context, param string
	status         int
	size           int64
	took           time.Duration
}

// stamps formats times, once per second.
type stamps struct{ latest atomic.Pointer[stamp] }

type stamp struct {
	second int64
	text   string
}

func (s *stamps) at(t time.Time, rfc bool) string {
	second := t.Unix()
	if l := s.latest.Load(); l != nil && l.second == second {
		return l.text
	}
	layout := "02/Jan/2006:15:04:05 -0700"
	if rfc {
		layout = time.RFC3339
	}
	l := &stamp{second, t.Format(layout)}
	s.latest.Store(l)
	return l.text
}

// remoteHost returns the address without the port.
func remoteHost(addr string) string {
	if host, _, err := net.SplitHostPort(addr); err == nil {
		return host
	}
	return addr
}

// appendCommon appends the common log format:
//
//	host - - [time] "method uri protocol" status bytes
func appendCommon(b []byte, e *entry) []byte { return append(appendCommonFields(b, e), '\n') }

// appendCombined appends the common log format with referrer and user agent.
func appendCombined(b []byte, e *entry) []byte {
	b = appendCommonFields(b, e)
	b = append(b, ` "`...)
	b = appendHeader(b, e, "Referer")
	b = append(b, `" "`...)
	b = appendHeader(b, e, "User-Agent")
	return append(b, "\"\n"...)
}

func appendCommonFields(b []byte, e *entry) []byte {
	b = appendText(b, remoteHost(e.x.RemoteAddr()))
	b = append(b, " - - ["...)
	b = append(b, e.stamp...)
	b = append(b, `] "`...)
	b = appendText(b, e.r.Method)
	b = append(b, ' ')
	b = appendMasked(b, e.r.RequestURI, e.param, appendText)
	b = append(b, ' ')
	b = appendText(b, e.r.Proto)
	b = append(b, `" `...)
	b = strconv.AppendInt(b, int64(e.status), 10)
	b = append(b, ' ')
	if e.size == 0 {
		return append(b, '-')
	}
	return strconv.AppendInt(b, e.size, 10)
}

func appendHeader(b []byte, e *entry, name string) []byte {
	v := e.r.Header[name]
	if len(v) == 0 || v[0] == "" {
		return append(b, '-')
	}
	return appendMasked(b, v[0], e.param, appendText)
}

// appendJSON appends one object.
func appendJSON(b []byte, e *entry) []byte {
	b = append(append(append(b, `{"time":"`...), e.stamp...), '"')
	b = field(b, "remote", remoteHost(e.x.RemoteAddr()), e.param)
	b = field(b, "method", e.r.Method, e.param)
	b = field(b, "host", e.r.Host, e.param)
	b = field(b, "uri", e.r.RequestURI, e.param)
	b = field(b, "proto", e.r.Proto, e.param)
	b = append(strconv.AppendInt(append(b, `,"status":`...), int64(e.status), 10), `,"bytes":`...)
	b = append(strconv.AppendInt(b, e.size, 10), `,"duration_us":`...)
	b = strconv.AppendInt(b, e.took.Microseconds(), 10)
	if e.context != "" {
		b = field(b, "context", e.context, e.param)
	}
	if s := e.x.SessionPrefix(); s != "" {
		b = field(b, "session", s, e.param)
	}
	for _, h := range [...]struct{ key, header string }{{"referer", "Referer"}, {"agent", "User-Agent"}} {
		if v := e.r.Header[h.header]; len(v) > 0 {
			b = field(b, h.key, v[0], e.param)
		}
	}
	return append(b, "}\n"...)
}

func field(b []byte, key, value, param string) []byte {
	b = append(append(append(b, `,"`...), key...), `":"`...)
	return append(appendMasked(b, value, param, appendJSONText), '"')
}

// appendMasked appends s, with all but the beginning of the values of session
// id parameters left out.
func appendMasked(b []byte, s, param string, text func([]byte, string) []byte) []byte {
	cut := len(s) > maxField
	if cut {
		s = s[:maxField]
	}
	for {
		i := findParam(s, param)
		if i < 0 {
			break
		}
		end := len(s)
		if j := strings.IndexAny(s[i:], ";/?#&,. \""); j >= 0 {
			end = i + j
		}
		shown := min(shownID, (end-i)/2)
		b = text(b, s[:i+shown])
		b = append(b, "..."...)
		s = s[end:]
	}
	b = text(b, s)
	if cut {
		b = append(b, "..."...)
	}
	return b
}

// findParam returns the index behind the first "param=" in s, letter case
// ignored, or -1.
func findParam(s, param string) int {
	for i := 0; ; {
		j := strings.IndexByte(s[i:], '=')
		if j < 0 {
			return -1
		}
		i += j + 1
		if start := i - 1 - len(param); start >= 0 && strings.EqualFold(s[start:i-1], param) {
			return i
		}
	}
}

const digits = "0123456789abcdef"

// appendText appends s so that it can forge neither a line nor a field: quotes,
// backslashes, controls and everything beyond ASCII become \xNN.
func appendText(b []byte, s string) []byte {
	from := 0
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			b = append(append(b, s[from:i]...), '\\', 'x', digits[c>>4], digits[c&15])
			from = i + 1
		}
	}
	return append(b, s[from:]...)
}

// appendJSONText appends s as the inside of a JSON string.
func appendJSONText(b []byte, s string) []byte {
	for i := 0; i < len(s); {
		c := s[i]
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
			i++
		case c < ' ' || c == 0x7f:
			b = append(b, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
			i++
		case c < utf8.RuneSelf:
			b = append(b, c)
			i++
		default:
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError || r == '\u2028' || r == '\u2029' || r == '\u0085' {
				r = utf8.RuneError // some tools take these for line ends
			}
			b = utf8.AppendRune(b, r)
			i += n
		}
	}
	return b
}
