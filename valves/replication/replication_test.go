package replication

import (
	"context"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/core/table"
)

// recorder is a manager that notes the levels of commits.
type recorder struct {
	core.Manager
	mu     sync.Mutex
	levels []core.Level
}

func (r *recorder) Commit(_ context.Context, _ []byte, l core.Level) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.levels = append(r.levels, l)
	return nil
}

func TestReplication(t *testing.T) {
	for name, tc := range map[string]struct {
		c      Config
		path   string
		level  core.Level // of the context
		commit []core.Level
	}{
		"plain":             {Config{}, "/shop/a.html", core.Async, []core.Level{core.Async}},
		"context's level":   {Config{}, "/shop/a.html", core.Synced, []core.Level{core.Synced}},
		"sync":              {Config{Send: "sync"}, "/shop/a.html", core.Async, []core.Level{core.Synced}},
		"ack":               {Config{Send: "ack"}, "/shop/a.html", core.Async, []core.Level{core.Acked}},
		"async":             {Config{Send: "async"}, "/shop/a.html", core.Synced, []core.Level{core.Async}},
		"filtered":          {Config{Filter: `.*\.gif|.*\.js`, Send: "sync"}, "/shop/x/a.gif", core.Async, nil},
		"filter, parameter": {Config{Filter: `.*\.gif`, Send: "sync"}, "/shop/a.gif;jsessionid=x?y", core.Async, nil},
		"not filtered":      {Config{Filter: `.*\.gif|.*\.js`, Send: "sync"}, "/shop/a.json", core.Async, []core.Level{core.Synced}},
		"pattern":           {Config{Patterns: []string{"*.css", "/shop/static/*"}, Send: "sync"}, "/shop/static/x", core.Async, nil},
	} {
		m := channel.NewMetrics()
		v, err := New(tc.c, channel.Settings{Metrics: m})
		if err != nil {
			t.Fatal(err)
		}
		rec := &recorder{}
		tab := table.New(table.Config{Manager: rec}, channel.Settings{})
		if err := tab.Start(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		var before []core.Level
		e, err := core.NewEngine(core.EngineOptions{
			Valves: []core.Valve{v},
			Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{
				Path: "/shop", Sessions: tab, Distributable: true, Level: tc.level,
				Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					s, err := session.From(r)
					if err == nil {
						err = s.Set("a", 1)
					}
					if err != nil {
						t.Errorf("%s: %v", name, err)
					}
				}),
			}}}},
		}, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		e.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", tc.path, nil))
		if len(tc.commit) == 0 || tc.commit[0] > core.Async {
			rec.mu.Lock() // what is waited for has happened by now
			before = slices.Clone(rec.levels)
			rec.mu.Unlock()
			if !slices.Equal(before, tc.commit) {
				t.Errorf("%s: at the end of the request: commits %v, want %v", name, before, tc.commit)
			}
		}
		if err := tab.Stop(t.Context()); err != nil { // hands over what is left
			t.Error(err)
		}
		if len(tc.commit) > 0 && !slices.Equal(rec.levels, tc.commit) {
			t.Errorf("%s: commits %v, want %v", name, rec.levels, tc.commit)
		}
		if got, want := m.Counter("replication_filtered_total", "").Value(), int64(0); len(tc.commit) == 0 && got != 1 || len(tc.commit) > 0 && got != want {
			t.Errorf("%s: replication_filtered_total %d", name, got)
		}
	}
}

func TestFilter(t *testing.T) {
	for _, tc := range []struct {
		c    Config
		path string
		want bool
	}{
		{Config{}, "/a.gif", false},
		{Config{Filter: `.*\.gif`}, "/a.gif", true},
		{Config{Filter: `.*\.gif`}, "/a.gif/b", false},
		{Config{Filter: `.*\.gif`}, "/agif", false},
		{Config{Filter: `.*\.gif`}, "/a.GIF", false},
		{Config{Filter: `.*\.gif`}, "/a\nb.gif", false},
		{Config{Filter: `.*\.gif|.*\.js`}, "/b.js", true},
		{Config{Filter: `.*\.gif|/img/.*`}, "/img/x", true},
		{Config{Filter: `.*\.gif|/img/.*`}, "/x/img/x", false},
		{Config{Filter: `/a|b`}, "/ab", false},
		{Config{Filter: `(?i).*\.gif`}, "/a.GIF", true},
		{Config{Patterns: []string{"*.gif"}}, "/x/y.gif", true},
		{Config{Patterns: []string{"*.gif"}}, "/x.gif/y", false},
		{Config{Patterns: []string{"/img/*"}}, "/img/a", true},
		{Config{Patterns: []string{"/img/*"}}, "/img/a/b", false},
	} {
		v, err := New(tc.c, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		if got := v.Filtered(tc.path); got != tc.want {
			t.Errorf("%+v, %q: %v", tc.c, tc.path, got)
		}
	}
}

func TestBadConfig(t *testing.T) {
	for _, c := range []Config{{Filter: "("}, {Filter: "*.gif"}, {Patterns: []string{"[a"}}, {Patterns: []string{""}}, {Send: "8"}, {Patterns: make([]string, 1000)}, {Filter: string(make([]byte, 1<<20))}} {
		if _, err := New(c, channel.Settings{}); err == nil {
			t.Errorf("%.60v was accepted", c)
		}
	}
}

// BenchmarkFilter: the usual filter, whose form is found out, against one that
// needs the regexp machine.
func BenchmarkFilter(b *testing.B) {
	const usual = `.*\.gif|.*\.js|.*\.jpeg|.*\.jpg|.*\.png|.*\.htm|.*\.html|.*\.css|.*\.txt`
	for name, expr := range map[string]string{"suffixes": usual, "regexp": `(?:` + usual + `)`} {
		b.Run(name, func(b *testing.B) {
			v, err := New(Config{Filter: expr}, channel.Settings{})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if v.Filtered("/shop/catalogue/item") {
					b.Fatal("filtered")
				}
			}
		})
	}
}
