package kubernetes

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2"
)

// api is a small API server: it keeps objects and a history of their changes,
// lists them in pages, and streams what comes later.
type api struct {
	mu      sync.Mutex
	version int
	objects map[string]map[string]any // by name
	history []change
	oldest  int           // versions before this one are gone
	changed chan struct{} // closed at every change
	calls   []string      // "list" or "watch from <version>"
	tokens  map[string]int

	// What goes wrong.
	fail     func(r *http.Request) int // a status to answer with; 0 for none
	token    string                    // the only one that is taken
	pageSize int                       // if smaller than what is asked for
	cutAfter int                       // a watch ends within the n-th line; 0 for never
	noise    string                    // a line that every watch begins with
	slow     time.Duration             // between the bytes of a list
	bookmark bool                      // send a bookmark at the end of what is known
	mute     bool                      // watches say nothing
	streams  int                       // watches that are open
}

type change struct {
	version int
	kind    string
	object  map[string]any
}

func newAPI() *api {
	return &api{objects: map[string]map[string]any{}, changed: make(chan struct{}), version: 1000, tokens: map[string]int{}}
}

func podObject(name, ip, phase string) map[string]any {
	return map[string]any{
		"kind":     "Pod",
		"metadata": map[string]any{"name": name, "uid": "uid-" + name, "creationTimestamp": "1999-12-31T23:00:00Z"},
		"status":   map[string]any{"phase": phase, "podIP": ip},
	}
}

func sliceObject(name string, ips ...string) map[string]any {
	var endpoints []any
	for _, ip := range ips {
		endpoints = append(endpoints, map[string]any{
			"addresses": []any{ip}, "conditions": map[string]any{"ready": false}, "targetRef": map[string]any{"uid": "uid-" + ip},
		})
	}
	return map[string]any{"kind": "EndpointSlice", "metadata": map[string]any{"name": name}, "endpoints": endpoints}
}

// put adds or changes an object, delete removes one.
func (a *api) put(o map[string]any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	name := o["metadata"].(map[string]any)["name"].(string)
	kind := "ADDED"
	if a.objects[name] != nil {
		kind = "MODIFIED"
	}
	a.note(kind, name, o)
}

func (a *api) delete(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	o := a.objects[name]
	a.note("DELETED", name, o)
	delete(a.objects, name)
}

func (a *api) note(kind, name string, o map[string]any) {
	a.version++
	o = maps.Clone(o)
	meta := maps.Clone(o["metadata"].(map[string]any))
	meta["resourceVersion"] = strconv.Itoa(a.version)
	o["metadata"] = meta
	a.objects[name] = o
	a.history = append(a.history, change{a.version, kind, o})
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *api) with(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *api) called(prefix string) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.calls {
		if strings.HasPrefix(c, prefix) {
			n++
		}
	}
	return n
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	status := 0
	if a.fail != nil {
		status = a.fail(r)
	}
	auth := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	a.tokens[auth]++
	if a.token != "" && auth != a.token {
		status = http.StatusUnauthorized
	}
	a.mu.Unlock()
	if status != 0 {
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"kind":"Status","code":%d,"message":"the test says so"}`, status)
		return
	}
	if r.URL.Query().Get("watch") != "" {
		a.watch(w, r)
		return
	}
	a.list(w, r)
}

func (a *api) list(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	limit, _ := strconv.Atoi(q.Get("limit"))
	from, _ := strconv.Atoi(q.Get("continue"))
	a.mu.Lock()
	a.calls = append(a.calls, "list "+r.URL.Path+" "+q.Get("labelSelector"))
	if a.pageSize > 0 {
		limit = min(limit, a.pageSize)
	}
	names := slices.Sorted(maps.Keys(a.objects))
	end := min(from+limit, len(names))
	meta := map[string]any{"resourceVersion": strconv.Itoa(a.version)}
	if end < len(names) {
		meta["continue"] = strconv.Itoa(end)
	}
	items := []any{}
	for _, n := range names[min(from, len(names)):end] {
		items = append(items, a.objects[n])
	}
	slow := a.slow
	a.mu.Unlock()
	b, err := json.Marshal(map[string]any{"kind": "List", "metadata": meta, "items": items})
	if err != nil {
		panic(err)
	}
	if slow == 0 {
		_, _ = w.Write(b)
		return
	}
	for i := range b {
		if _, err := w.Write(b[i : i+1]); err != nil || r.Context().Err() != nil {
			return
		}
		w.(http.Flusher).Flush()
		time.Sleep(slow)
	}
}

func (a *api) watch(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	at, _ := strconv.Atoi(q.Get("resourceVersion"))
	seconds, _ := strconv.Atoi(q.Get("timeoutSeconds"))
	end := time.NewTimer(time.Duration(seconds) * time.Second)
	defer end.Stop()
	a.mu.Lock()
	a.calls = append(a.calls, "watch from "+q.Get("resourceVersion"))
	a.streams++
	noise, cut, gone := a.noise, a.cutAfter, at < a.oldest
	a.mu.Unlock()
	defer func() { a.mu.Lock(); a.streams--; a.mu.Unlock() }()
	lines := 0
	say := func(kind string, object any) bool {
		b, err := json.Marshal(map[string]any{"type": kind, "object": object})
		if err != nil {
			panic(err)
		}
		if lines++; cut > 0 && lines >= cut {
			_, _ = w.Write(b[:len(b)/2])
			return false
		}
		_, err = w.Write(append(b, '\n'))
		w.(http.Flusher).Flush()
		return err == nil
	}
	w.(http.Flusher).Flush()
	if noise != "" {
		fmt.Fprintln(w, noise)
		w.(http.Flusher).Flush()
	}
	if gone {
		say("ERROR", map[string]any{"kind": "Status", "code": 410, "message": "too old resource version"})
		return
	}
	for {
		a.mu.Lock()
		changed, mute := a.changed, a.mute
		var news []change
		for _, c := range a.history {
			if c.version > at {
				news = append(news, c)
			}
		}
		version, bookmark := a.version, a.bookmark
		a.mu.Unlock()
		if mute {
			news, bookmark = nil, false
		}
		for _, c := range news {
			if !say(c.kind, c.object) {
				return
			}
			at = c.version
		}
		if bookmark && at < version {
			at = version
			if !say("BOOKMARK", map[string]any{"metadata": map[string]any{"resourceVersion": strconv.Itoa(version)}}) {
				return
			}
		}
		select {
		case <-changed:
		case <-end.C:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// serve serves a on a net, and returns its URL and what stops it.
func serve(t testing.TB, n transport.Net, at netip.AddrPort, a *api) (string, func()) {
	t.Helper()
	l, err := channel.ListenTCP(n, at)
	if err != nil {
		t.Fatal(err)
	}
	var handlers sync.WaitGroup
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers.Add(1)
		defer handlers.Done()
		a.ServeHTTP(w, r)
	})}
	done := make(chan struct{})
	go func() { // ends with the stop
		_ = srv.Serve(plain{l})
		close(done)
	}()
	return "http://" + l.Addr().(*net.TCPAddr).AddrPort().String(), func() {
		srv.Close()
		<-done
		handlers.Wait()
	}
}

type plain struct{ transport.TCPListener }

func (l plain) Accept() (net.Conn, error) { return l.TCPListener.Accept() }
