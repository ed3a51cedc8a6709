package cmd

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/longhouse-go/longhouse/core"
)

// backends starts servers that answer with their route, and a balancer.
func backends(t *testing.T, routes ...string) (*balancer, map[string]*httptest.Server, *httptest.Server) {
	b := newBalancer(routes)
	servers := map[string]*httptest.Server{}
	for _, r := range routes {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			body, _ := io.ReadAll(req.Body)
			_, _ = io.WriteString(w, r+string(body))
		}))
		t.Cleanup(s.Close)
		servers[r] = s
		b.set(r, strings.TrimPrefix(s.URL, "http://"))
	}
	front := httptest.NewServer(b)
	t.Cleanup(front.Close)
	return b, servers, front
}

const someID = "0123456789ABCDEF0123456789ABCDEF"

func ask(t *testing.T, front *httptest.Server, method, path, route, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, front.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if route != "" {
		req.Header.Set("Cookie", "JSESSIONID="+someID+"."+route)
	}
	resp, err := front.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text)
}

func TestBalancerIsSticky(t *testing.T) {
	_, servers, front := backends(t, "a", "b", "c")
	for range 5 {
		for _, r := range []string{"a", "b", "c"} {
			if _, got := ask(t, front, "GET", "/", r, ""); got != r {
				t.Errorf("session of %s went to %s", r, got)
			}
			if _, got := ask(t, front, "GET", "/x;jsessionid="+someID+"."+r, "", ""); got != r {
				t.Errorf("session of %s in the path went to %s", r, got)
			}
		}
	}
	servers["b"].Close()
	// The GET may meet a kept connection that has just died, and is repeated; it
	// tells the balancer, so that the POST is not sent there.
	if code, got := ask(t, front, "GET", "/", "b", ""); code != http.StatusOK || got != "a" && got != "c" {
		t.Errorf("GET after the node's death: %d %q", code, got)
	}
	if code, got := ask(t, front, "POST", "/", "b", "body"); code != http.StatusOK || got != "abody" && got != "cbody" {
		t.Errorf("after the node's death: %d %q", code, got)
	}
}

// A request that may have been carried out is not carried out again.
func TestBalancerDoesNotRepeatPosts(t *testing.T) {
	b, _, front := backends(t, "a", "b")
	var hits atomic.Int32
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			hits.Add(1)
			_, _ = c.Read(make([]byte, 1024)) // takes the request, then dies
			c.Close()
		}
	}()
	b.set("a", ln.Addr().String())
	if code, _ := ask(t, front, "POST", "/", "a", "x"); code != http.StatusServiceUnavailable {
		t.Errorf("POST: status %d, want 503", code)
	}
	if hits.Load() != 1 {
		t.Errorf("the POST was sent %d times", hits.Load())
	}
	b.set("a", ln.Addr().String())
	if code, got := ask(t, front, "GET", "/", "a", ""); code != http.StatusOK || got != "b" {
		t.Errorf("GET: %d %q, want the other node", code, got)
	}
}

// What a draining node refuses goes to another one, if that does no harm; if all
// refuse, the client is told.
func TestBalancerLeavesDrainingNodes(t *testing.T) {
	for _, c := range []struct {
		how, method string
		moves       bool
	}{
		{core.DrainingRefused, "POST", true},
		{core.DrainingRefused, "GET", true},
		{core.DrainingNoSession, "GET", true},
		{core.DrainingNoSession, "PUT", true},
		{core.DrainingNoSession, "POST", false},
		{"", "GET", false},
	} {
		b := newBalancer([]string{"a", "b"})
		for _, route := range []string{"a", "b"} {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if route == "a" {
					if c.how != "" {
						w.Header().Set(core.DrainingHeader, c.how)
					}
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				body, _ := io.ReadAll(r.Body)
				_, _ = w.Write(body)
			}))
			t.Cleanup(s.Close)
			b.set(route, strings.TrimPrefix(s.URL, "http://"))
		}
		front := httptest.NewServer(b)
		t.Cleanup(front.Close)
		code, body := ask(t, front, c.method, "/", "a", "body")
		if moved := code == http.StatusOK && body == "body"; moved != c.moves || !moved && code != http.StatusServiceUnavailable {
			t.Errorf("%s, %q: %d %q", c.method, c.how, code, body)
		}
		if !c.moves {
			continue
		}
		b.set("b", "") // nobody else is there
		if code, _ := ask(t, front, c.method, "/", "a", "body"); code != http.StatusServiceUnavailable {
			t.Errorf("%s, %q, alone: %d", c.method, c.how, code)
		}
	}
}
