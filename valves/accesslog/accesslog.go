// Package accesslog is a valve that writes one line per request: in the common
// or combined form that log tools know, or as JSON. Lines are collected in
// memory and written by one goroutine, so that a slow disk never delays a
// request; lines that do not fit are dropped and counted. It imports core,
// core/session and channel only.
package accesslog

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"go.uber.org/zap"
)

// Forms of a line.
const (
	Common   = "common"
	Combined = "combined"
	JSON     = "json"
)

// Defaults and bounds of Config.
const (
	DefaultFlush  = time.Second
	DefaultBuffer = 1 << 20
	minBuffer     = 64 << 10
	maxBuffer     = 256 << 20
)

// Config is what users write.
type Config struct {
	// Format is common, combined or json.
	Format string `yaml:"format"`
	// File is the file to append to, or stderr or stdout. A file that is moved
	// away or deleted is opened anew within the flush interval, so rotating it
	// needs no signal.
	File string `yaml:"file"`
	// Flush is how long lines wait in memory at most.
	Flush time.Duration `yaml:"flush"`
	// Buffer bounds the lines in memory, in bytes.
	Buffer int `yaml:"buffer"`
}

// Default returns the defaults.
func Default() Config {
	return Config{Format: Combined, File: "stderr", Flush: DefaultFlush, Buffer: DefaultBuffer}
}

// Validate checks the configuration.
func (c *Config) Validate() error {
	var errs []error
	switch c.Format {
	case Common, Combined, JSON:
	default:
		errs = append(errs, fmt.Errorf("accesslog: format %q: use common, combined or json", c.Format))
	}
	if c.File == "" {
		errs = append(errs, errors.New("accesslog: file is empty: name a file, stderr or stdout"))
	}
	if c.Flush <= 0 || c.Flush > time.Hour {
		errs = append(errs, fmt.Errorf("accesslog: flush %v: must be above 0 and at most 1h", c.Flush))
	}
	if c.Buffer < minBuffer || c.Buffer > maxBuffer {
		errs = append(errs, fmt.Errorf("accesslog: buffer of %d bytes: must be between %d and %d", c.Buffer, minBuffer, maxBuffer))
	}
	return errors.Join(errs...)
}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("accesslog", Default(), func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s)
})

// Valve writes the access log.
type Valve struct {
	cfg    Config
	sink   *sink
	format func(dst []byte, e *entry) []byte
	lines  sync.Pool // of *line
	stamps stamps
	log    func(*core.Exchange) // v.record, kept to save an allocation per request
}

// New returns the valve. It opens nothing before Start.
func New(c Config, s channel.Settings) (*Valve, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	v := &Valve{cfg: c, sink: newSink(c, s)}
	switch c.Format {
	case Common:
		v.format = appendCommon
	case Combined:
		v.format = appendCombined
	case JSON:
		v.format = appendJSON
	}
	v.lines.New = func() any { return new(line) }
	v.log = v.record
	return v, nil
}

// Start opens the file and begins to write.
func (v *Valve) Start(context.Context) error { return v.sink.start() }

// Stop writes what is left, as far as ctx allows, and closes the file. It works
// twice and without Start.
func (v *Valve) Stop(ctx context.Context) error { return v.sink.stop(ctx) }

// Wrap has each request logged when it is complete.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if x := core.FromContext(r.Context()); x != nil {
			x.OnEnd(v.log)
		}
		next.ServeHTTP(w, r)
	})
}

// line is the memory for making one line.
type line struct {
	text []byte
	entry
}

// record adds the line of a complete request.
func (v *Valve) record(x *core.Exchange) {
	l := v.lines.Get().(*line)
	l.entry = entry{
		x: x, r: x.Request(), stamp: v.stamps.at(x.Start(), v.cfg.Format == JSON),
		status: x.Status(), size: x.Written(), took: time.Since(x.Start()), param: "jsessionid",
	}
	if c := x.Context(); c != nil {
		l.context, l.param = c.Name(), c.PathParam()
	}
	l.text = v.format(l.text[:0], &l.entry)
	v.sink.add(l.text)
	l.entry = entry{} // keep no request alive
	v.lines.Put(l)
}
