package cmd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// balancer is the small sticky load balancer of the demo: it does what mod_jk
// does with a worker per node. A session goes to the node named by the route in
// its id while that node is up, else to any other; requests without a session go
// round robin.
type balancer struct {
	backends []*backend
	next     atomic.Uint32
	proxy    *httputil.ReverseProxy
}

// backend is one node.
type backend struct {
	route string
	mu    sync.Mutex
	addr  string // host:port, "" until the node has announced it
	down  time.Time
}

// retryAfter is how long a node that refused a connection is left alone, unless
// no other is left.
const retryAfter = time.Second

// readyEvery is how often the nodes are asked whether they are ready.
const readyEvery = 250 * time.Millisecond

// maxReplay bounds the request body that is kept for a second try, in bytes.
const maxReplay = 1 << 20

func newBalancer(routes []string) *balancer {
	b := &balancer{}
	for _, r := range routes {
		b.backends = append(b.backends, &backend{route: r})
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 64
	transport.DialContext = (&net.Dialer{Timeout: time.Second}).DialContext
	b.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetXForwarded()
			r.Out.Host = r.In.Host
			r.Out.URL.Scheme = "http"
			r.Out.URL.Host = "node" // replaced by RoundTrip
		},
		Transport: &failover{b, transport},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "no node answers: "+err.Error(), http.StatusServiceUnavailable)
		},
	}
	return b
}

// set tells where a node listens now.
func (b *balancer) set(route, addr string) {
	for _, be := range b.backends {
		if be.route == route {
			be.mu.Lock()
			be.addr, be.down = addr, time.Time{}
			be.mu.Unlock()
		}
	}
}

func (b *balancer) ServeHTTP(w http.ResponseWriter, r *http.Request) { b.proxy.ServeHTTP(w, r) }

// order returns the nodes in the order in which they should be tried.
func (b *balancer) order(r *http.Request) []*backend {
	route := requestRoute(r)
	n := int(b.next.Add(1))
	list := make([]*backend, len(b.backends))
	for i := range list {
		list[i] = b.backends[(n+i)%len(b.backends)]
	}
	rank := func(be *backend) int {
		switch {
		case be.isDown():
			return 2
		case be.route == route:
			return 0
		}
		return 1
	}
	slices.SortStableFunc(list, func(x, y *backend) int { return rank(x) - rank(y) })
	return list
}

func (be *backend) isDown() bool {
	be.mu.Lock()
	defer be.mu.Unlock()
	return be.addr == "" || time.Since(be.down) < retryAfter
}

// requestRoute finds the route in the session cookie or path parameter.
func requestRoute(r *http.Request) string {
	for _, c := range r.CookiesNamed("JSESSIONID") {
		if _, route, ok := session.ParseID(c.Value); ok && route != "" {
			return route
		}
	}
	if _, after, ok := strings.Cut(r.URL.Path, ";jsessionid="); ok {
		id, _, _ := strings.Cut(after, "/")
		if _, route, ok := session.ParseID(id); ok {
			return route
		}
	}
	return ""
}

// failover tries the nodes one after the other.
type failover struct {
	b    *balancer
	next http.RoundTripper
}

func (f *failover) RoundTrip(r *http.Request) (*http.Response, error) {
	body, replay := replayable(r)
	var errs []error
	var last *http.Response
	for _, be := range f.b.order(r) {
		be.mu.Lock()
		addr := be.addr
		be.mu.Unlock()
		if addr == "" {
			continue
		}
		out := r.Clone(r.Context())
		out.URL.Host = addr
		if replay {
			out.Body = body()
		}
		resp, err := f.next.RoundTrip(out)
		if err == nil {
			if !replay || !refusedByDrain(r, resp) {
				if last != nil {
					last.Body.Close()
				}
				return resp, nil
			}
			f.b.markDown(be.route)
			if last != nil {
				last.Body.Close()
			}
			last = resp // if nobody else answers
			continue
		}
		errs = append(errs, err)
		if r.Context().Err() != nil {
			break
		}
		be.mu.Lock()
		if be.addr == addr {
			be.down = time.Now()
		}
		be.mu.Unlock()
		if !replay || !mayRepeat(r, err) {
			break
		}
	}
	if last != nil {
		return last, nil
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("no node has started yet"))
	}
	return nil, errors.Join(errs...)
}

// refusedByDrain reports whether a node that is going to stop has answered what
// another node would answer better, and may be asked.
func refusedByDrain(r *http.Request, resp *http.Response) bool {
	if resp.StatusCode != http.StatusServiceUnavailable {
		return false
	}
	switch resp.Header.Get(core.DrainingHeader) {
	case core.DrainingRefused:
		return true
	case core.DrainingNoSession:
		return core.Idempotent(r.Method)
	}
	return false
}

// mayRepeat reports whether a failed request may go to another node: always if
// it was never sent, else only if repeating it does no harm.
func mayRepeat(r *http.Request, err error) bool {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return true
	}
	return core.Idempotent(r.Method)
}

// replayable reads a small body so that it can be sent again.
func replayable(r *http.Request) (body func() io.ReadCloser, ok bool) {
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		return func() io.ReadCloser { return http.NoBody }, true
	}
	if r.ContentLength < 0 || r.ContentLength > maxReplay {
		return nil, false
	}
	buf := make([]byte, r.ContentLength)
	if _, err := io.ReadFull(r.Body, buf); err != nil {
		return nil, false // the client has gone: the transport will notice too
	}
	return func() io.ReadCloser { return io.NopCloser(bytes.NewReader(buf)) }, true
}

// watch asks the nodes' admin API whether they are ready, so that a frozen or
// draining node is left out before a user notices.
func (b *balancer) watch(ctx context.Context, route string, admin *url.URL) {
	client := &http.Client{Timeout: time.Second}
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, admin.JoinPath("readyz").String(), nil)
		if err != nil {
			return
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		if err != nil || resp.StatusCode != http.StatusOK {
			b.markDown(route)
		}
	}
}

func (b *balancer) markDown(route string) {
	for _, be := range b.backends {
		if be.route == route {
			be.mu.Lock()
			be.down = time.Now()
			be.mu.Unlock()
		}
	}
}
