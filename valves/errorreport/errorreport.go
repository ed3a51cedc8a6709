// Package errorreport is a valve that gives error responses without a body a
// clean page: HTML for browsers, JSON for programs that ask for it, plain text
// for the rest. It shows nothing of the inside. It imports core and channel
// only.
package errorreport

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"strings"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
)

// Config is what users write.
type Config struct {
	// ShowNode adds the node's route to the page.
	ShowNode bool `yaml:"show_node"`
}

// Factory makes the valve from configuration.
var Factory = channel.FactoryOf("errorreport", Config{}, func(c Config, s channel.Settings) (core.Valve, error) {
	return New(c, s), nil
})

// Valve writes error pages.
type Valve struct {
	showNode bool
	pages    *channel.Counter
	page     core.ErrorPage // v.write, kept to save an allocation per request
}

// New returns the valve.
func New(c Config, s channel.Settings) *Valve {
	v := &Valve{
		showNode: c.ShowNode,
		pages:    s.Metrics.Counter("errorreport_pages_total", "Error pages written."),
	}
	v.page = v.write
	return v
}

// Wrap makes the valve the writer of the request's error pages. The container
// writes them when the handler has ended, also after a panic.
func (v *Valve) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if x := core.FromContext(r.Context()); x != nil {
			x.SetErrorPage(v.page)
		}
		next.ServeHTTP(w, r)
	})
}

// report is the JSON form.
type report struct {
	Status  int    `json:"status"`
	Error   string `json:"error"`
	Message string `json:"message,omitempty"`
	Node    string `json:"node,omitempty"`
}

func (v *Valve) write(w http.ResponseWriter, x *core.Exchange, status int, message string) {
	v.pages.Inc()
	rep := report{Status: status, Error: http.StatusText(status), Message: message}
	if rep.Error == "" {
		rep.Error = "Error"
	}
	if v.showNode {
		rep.Node = x.Engine().Route()
	}
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	switch form(x.Request().Header["Accept"]) {
	case "json":
		h.Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(rep)
	case "html":
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		_, _ = fmt.Fprint(w, rep.html())
	default:
		h.Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = fmt.Fprint(w, rep.text())
	}
}

// form chooses by the first type of the Accept header that is known.
func form(accept []string) string {
	for _, line := range accept {
		for t := range strings.SplitSeq(line, ",") {
			t, _, _ = strings.Cut(t, ";")
			switch t = strings.ToLower(strings.TrimSpace(t)); {
			case t == "text/html", t == "application/xhtml+xml":
				return "html"
			case t == "application/json", strings.HasSuffix(t, "+json"):
				return "json"
			case t == "text/plain":
				return "text"
			}
		}
	}
	return "text"
}

func (r report) text() string {
	s := fmt.Sprintf("%d %s\n", r.Status, r.Error)
	if r.Message != "" {
		s += r.Message + "\n"
	}
	if r.Node != "" {
		s += "node " + r.Node + "\n"
	}
	return s
}

func (r report) html() string {
	title := fmt.Sprintf("%d %s", r.Status, html.EscapeString(r.Error))
	var b strings.Builder
	b.WriteString("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>" + title + "</title>" +
		"<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:15vh auto;padding:0 1rem}h1{font-size:1.5rem}</style>" +
		"</head><body><h1>" + title + "</h1>")
	if r.Message != "" {
		b.WriteString("<p>" + html.EscapeString(r.Message) + "</p>")
	}
	if r.Node != "" {
		b.WriteString("<p><small>node " + html.EscapeString(r.Node) + "</small></p>")
	}
	b.WriteString("</body></html>\n")
	return b.String()
}
