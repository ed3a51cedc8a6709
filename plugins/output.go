package plugins

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/longhouse-go/longhouse/channel"
)

// Bounds of a plugin's output.
const (
	// maxLine bounds one line in bytes; the rest of a longer one is dropped.
	maxLine = 64 << 10
	// maxLogText bounds what is logged of a line that is no JSON, and each value
	// of one that is, in bytes.
	maxLogText = 4 << 10
	// maxFields bounds the fields of one line.
	maxFields = 32
	// lineBurst and lineRate bound the lines that are logged, at once and per
	// second; further ones are dropped and counted.
	lineBurst = 2000
	lineRate  = 500
)

// output logs what a plugin writes. It tolerates anything. It may be used from
// several goroutines.
type output struct {
	log              *zap.Logger
	flooded, cut     *channel.Counter
	mu               sync.Mutex
	budget           float64   // guarded by mu: lines that may be logged now
	refilled         time.Time // guarded by mu
	panicking        bool      // guarded by mu: a Go panic is being printed
	words            string    // guarded by mu: the last line that looked like an end
	floodIsAnnounced bool      // guarded by mu
}

func newOutput(log *zap.Logger, m *channel.Metrics, kind, name string) *output {
	counter := func(reason string) *channel.Counter {
		return m.Counter("plugin_output_refused_total", "Lines of a plugin's output that were dropped or cut.", "kind", kind, "name", name, "reason", reason)
	}
	return &output{log: log, flooded: counter("flood"), cut: counter("length"), budget: lineBurst}
}

// pump logs lines until r ends. Lines of the original standard error are the
// SDK's log.
func (o *output) pump(r io.Reader, structured bool) {
	br := bufio.NewReaderSize(r, maxLine)
	skipping := false
	for {
		b, err := br.ReadSlice('\n')
		long := errors.Is(err, bufio.ErrBufferFull)
		if !skipping && len(b) > 0 {
			o.line(bytes.TrimRight(b, "\r\n"), structured && !long, long)
		}
		skipping = long
		if err != nil && !long {
			return // the end of the process, or the deadline after it
		}
	}
}

// writer returns a writer that logs lines, for go-plugin.
func (o *output) writer() io.Writer { return &lineWriter{o: o} }

type lineWriter struct {
	o    *output
	mu   sync.Mutex
	buf  []byte // guarded by mu: the beginning of a line
	skip bool   // guarded by mu: the rest of a line that was too long
}

// Write implements io.Writer; it never fails.
func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(p)
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n')
		part, rest := p, []byte(nil)
		if end >= 0 {
			part, rest = p[:end], p[end+1:]
		}
		if !w.skip {
			w.buf = append(w.buf, part[:min(len(part), maxLine-len(w.buf))]...)
			if len(w.buf) >= maxLine {
				w.o.line(w.buf, false, true)
				w.skip = true
			} else if end >= 0 {
				w.o.line(w.buf, false, false)
			}
		}
		if end >= 0 {
			w.buf, w.skip = w.buf[:0], false
		}
		p = rest
	}
	return n, nil
}

// line logs one line.
func (o *output) line(b []byte, structured, long bool) {
	if long {
		o.cut.Inc()
	}
	if len(b) == 0 {
		return
	}
	if structured && b[0] == '{' && o.json(b) {
		return
	}
	level := zapcore.DebugLevel
	text := printable(b)
	o.mu.Lock()
	if structured && (strings.HasPrefix(text, "panic: ") || strings.HasPrefix(text, "fatal error: ")) {
		o.panicking = true
		o.words = text
	}
	if o.panicking {
		level = zapcore.ErrorLevel
	} else if structured {
		o.words = text
	}
	o.mu.Unlock()
	if ce := o.log.Check(level, text); ce != nil && o.allowed() {
		ce.Write(zap.Bool("cut", long))
	}
}

// json logs a line of the SDK's log; false if it is something else.
func (o *output) json(b []byte) bool {
	var m map[string]any
	if json.Unmarshal(b, &m) != nil {
		return false
	}
	text := func(keys ...string) string {
		for _, k := range keys {
			if v, ok := m[k]; ok {
				delete(m, k)
				return printable([]byte(fmt.Sprint(v)))
			}
		}
		return ""
	}
	msg := text("@message", "msg", "message")
	level, err := zapcore.ParseLevel(text("@level", "level"))
	if err != nil || level > zapcore.ErrorLevel {
		// A plugin cannot make the node panic or end, whatever it says.
		level = zapcore.DebugLevel
		if err == nil {
			level = zapcore.ErrorLevel
		}
	}
	ce := o.log.Check(level, msg)
	if ce == nil || !o.allowed() {
		return true
	}
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	fields := make([]zap.Field, 0, min(len(keys), maxFields))
	for _, k := range keys[:min(len(keys), maxFields)] {
		fields = append(fields, zap.String(printable([]byte(k)), value(m[k])))
	}
	ce.Write(fields...)
	return true
}

func value(v any) string {
	if s, ok := v.(string); ok {
		return printable([]byte(s))
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "?"
	}
	return printable(b)
}

// printable makes text of anything: valid UTF-8, no control characters, bounded.
func printable(b []byte) string {
	if len(b) > maxLogText {
		b = append(bytes.Clone(b[:maxLogText]), "…"...)
	}
	s := strings.ToValidUTF8(string(b), "\uFFFD")
	if strings.IndexFunc(s, unicode.IsControl) < 0 {
		return s
	}
	var out strings.Builder
	for _, r := range s {
		if unicode.IsControl(r) && r != '\t' {
			out.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
			continue
		}
		out.WriteRune(r)
	}
	return out.String()
}

// allowed takes one line from the budget.
func (o *output) allowed() bool {
	now := time.Now()
	o.mu.Lock()
	if !o.refilled.IsZero() {
		o.budget = min(lineBurst, o.budget+now.Sub(o.refilled).Seconds()*lineRate)
	}
	o.refilled = now
	ok := o.budget >= 1
	announce := false
	if ok {
		o.budget--
		o.floodIsAnnounced = o.floodIsAnnounced && o.budget < lineBurst/2
	} else {
		announce = !o.floodIsAnnounced
		o.floodIsAnnounced = true
	}
	o.mu.Unlock()
	if !ok {
		o.flooded.Inc()
	}
	if announce {
		o.log.Warn("plugin logs too much; lines are dropped and counted", zap.Int("bound_per_second", lineRate))
	}
	return ok
}

// lastWords returns the last line that was no log line, and forgets it: the
// first line of a panic if there was one.
func (o *output) lastWords() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	w := o.words
	o.words, o.panicking = "", false
	if len(w) > 300 {
		w = strings.ToValidUTF8(w[:300], "") + "…"
	}
	return w
}
