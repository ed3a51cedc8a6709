package core_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// protocols are the servers that the matrix runs over.
var protocols = []string{"h1", "h2", "h2c"}

// listen serves h over a protocol and returns the base URL and a client for it.
func listen(t *testing.T, protocol string, h http.Handler) (string, *http.Client) {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = nil
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	switch protocol {
	case "h1":
		tr.Protocols.SetHTTP1(true)
		srv.Start()
	case "h2":
		srv.EnableHTTP2 = true
		tr.Protocols.SetHTTP2(true)
		srv.StartTLS()
		tr.TLSClientConfig = &tls.Config{RootCAs: srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs}
	case "h2c":
		srv.Config.Protocols = new(http.Protocols)
		srv.Config.Protocols.SetUnencryptedHTTP2(true)
		tr.Protocols.SetUnencryptedHTTP2(true)
		srv.Start()
	}
	t.Cleanup(func() { tr.CloseIdleConnections(); srv.Close() })
	return srv.URL, &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// hooked is a valve that adds X-Hook before the commit.
var hooked = core.ValveFunc(func(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		core.FromContext(r.Context()).OnCommit(func(x *core.Exchange) error {
			w.Header().Set("X-Hook", "1")
			return nil
		})
		next.ServeHTTP(w, r)
	})
})

func rooted(t *testing.T, h http.Handler, valves ...core.Valve) *core.Engine {
	t.Helper()
	return newEngine(t, core.EngineOptions{Valves: valves, Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{{Handler: h}}}}})
}

// answer is what a client saw.
type answer struct {
	status   int
	header   http.Header
	body     string
	trailer  http.Header
	early    []string
	bodyErr  error
	length   int64
	proto    int
	informal int
}

func ask(t *testing.T, c *http.Client, method, url string, body io.Reader) (a answer) {
	t.Helper()
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		a.informal = code
		a.early = append(a.early, h["Link"]...)
		return nil
	}}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	a.status, a.header, a.body, a.bodyErr = resp.StatusCode, resp.Header, string(b), err
	a.trailer, a.length, a.proto = resp.Trailer, resp.ContentLength, resp.ProtoMajor
	return a
}

// TestResponseMatrix compares handlers behind the engine with the same handlers
// on bare net/http, over all protocols.
func TestResponseMatrix(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file.txt")
	if err := os.WriteFile(file, bytes.Repeat([]byte("0123456789"), 20_000), 0o600); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 3*(8<<10)+17)
	check := func(w http.ResponseWriter, err error) {
		if err != nil {
			t.Errorf("in the handler: %v", err)
		}
	}
	cases := map[string]http.HandlerFunc{
		"empty":       func(http.ResponseWriter, *http.Request) {},
		"small":       func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") },
		"3 KiB":       func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, big[:3<<10]) },
		"buffer full": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, big[:8<<10]) },
		"one more":    func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, big[:8<<10]); io.WriteString(w, "y") },
		"big":         func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, big) },
		"big pieces": func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(big); i += 1000 {
				w.Write([]byte(big[i:min(i+1000, len(big))]))
			}
		},
		"redirect":   func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
		"http.Error": func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusTeapot) },
		"204":        func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) },
		"304":        func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Etag", `"a"`); w.WriteHeader(304) },
		"204 body": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(204)
			if _, err := w.Write([]byte("x")); !errors.Is(err, http.ErrBodyNotAllowed) {
				t.Errorf("write to a 204: %v", err)
			}
		},
		"404 bare": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(404) },
		"length": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "5")
			io.WriteString(w, "hel")
			io.WriteString(w, "lo")
		},
		"bad length": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "many")
			io.WriteString(w, "hello")
		},
		"second status": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(201)
			io.WriteString(w, "x")
		},
		"flush": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			io.WriteString(w, "b")
			w.(http.Flusher).Flush()
			io.WriteString(w, "c")
		},
		"flush first": func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			io.WriteString(w, "c")
		},
		"controller": func(w http.ResponseWriter, r *http.Request) {
			rc := http.NewResponseController(w)
			check(w, rc.SetWriteDeadline(time.Now().Add(time.Minute)))
			check(w, rc.SetReadDeadline(time.Now().Add(time.Minute)))
			io.WriteString(w, "a")
			check(w, rc.Flush())
			io.WriteString(w, "b")
		},
		"full duplex": func(w http.ResponseWriter, r *http.Request) {
			check(w, http.NewResponseController(w).EnableFullDuplex())
			in := bufio.NewReader(r.Body)
			for {
				line, err := in.ReadString('\n')
				io.WriteString(w, line)
				check(w, http.NewResponseController(w).Flush())
				if err != nil {
					return
				}
			}
		},
		"ServeFile": func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) },
		"range": func(w http.ResponseWriter, r *http.Request) {
			r.Header.Set("Range", "bytes=5-12")
			http.ServeFile(w, r, file)
		},
		"io.Copy": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "head:")
			n, err := io.Copy(w, io.LimitReader(strings.NewReader(big), 20_000))
			if check(w, err); n != 20_000 {
				t.Errorf("copied %d", n)
			}
			io.WriteString(w, ":tail")
		},
		"early hints": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(103)
			io.WriteString(w, "x")
		},
		"trailers": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "X-Sum, X-Count")
			io.WriteString(w, "body")
			w.Header().Set("X-Sum", "abc")
			w.Header().Set("X-Count", "4")
		},
		"late trailers": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "body")
			w.(http.Flusher).Flush()
			w.Header().Set(http.TrailerPrefix+"X-Late", "1")
		},
		"sniff":        func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html><body>x") },
		"request body": func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) },
		"StringWriter": func(w http.ResponseWriter, r *http.Request) { w.(io.StringWriter).WriteString("s") },
	}
	for _, protocol := range protocols {
		for name, h := range cases {
			methods := []string{"GET"}
			switch name {
			case "small", "3 KiB", "big", "length", "ServeFile", "empty", "204":
				methods = append(methods, "HEAD")
			case "full duplex", "request body":
				methods = []string{"POST"}
			}
			for _, method := range methods {
				t.Run(protocol+"/"+name+"/"+method, func(t *testing.T) {
					var body func() io.Reader = func() io.Reader { return nil }
					if method == "POST" {
						body = func() io.Reader { return strings.NewReader("line 1\nline 2\n") }
					}
					url, c := listen(t, protocol, h)
					want := ask(t, c, method, url+"/", body())
					url, c = listen(t, protocol, rooted(t, h, hooked))
					got := ask(t, c, method, url+"/", body())

					if got.header.Get("X-Hook") != "1" {
						t.Error("the hook's header is missing")
					}
					got.header.Del("X-Hook")
					if got.status != want.status || got.body != want.body || (got.bodyErr == nil) != (want.bodyErr == nil) {
						t.Errorf("status %d, body of %d bytes, %v; net/http: %d, %d, %v",
							got.status, len(got.body), got.bodyErr, want.status, len(want.body), want.bodyErr)
					}
					if got.informal != want.informal || !slices.Equal(got.early, want.early) {
						t.Errorf("1xx %d %q; net/http: %d %q", got.informal, got.early, want.informal, want.early)
					}
					for _, h := range []http.Header{got.header, want.header} {
						h.Del("Date")
						if name == "3 KiB" || name == "buffer full" || name == "bad length" { // here the engine knows the length
							h.Del("Content-Length")
						}
					}
					if fmt.Sprint(got.header) != fmt.Sprint(want.header) {
						t.Errorf("header %v; net/http: %v", got.header, want.header)
					}
					if fmt.Sprint(got.trailer) != fmt.Sprint(want.trailer) {
						t.Errorf("trailer %v; net/http: %v", got.trailer, want.trailer)
					}
					if (name == "3 KiB" || name == "buffer full") && method == "GET" && got.length != int64(len(got.body)) {
						t.Errorf("length %d of %d bytes", got.length, len(got.body))
					}
				})
			}
		}
	}
}

// TestWriteBeyondLength: what is too much is refused at once, and the rest
// arrives.
func TestWriteBeyondLength(t *testing.T) {
	for _, protocol := range protocols {
		url, c := listen(t, protocol, rooted(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "5")
			io.WriteString(w, "hello")
			if _, err := io.WriteString(w, " world"); !errors.Is(err, http.ErrContentLength) {
				t.Errorf("%s: %v", protocol, err)
			}
		})))
		if got := ask(t, c, "GET", url+"/", nil); got.body != "hello" || got.bodyErr != nil {
			t.Errorf("%s: %q, %v", protocol, got.body, got.bodyErr)
		}
	}
}

// TestMethodSets: only what the connection can do is offered.
func TestMethodSets(t *testing.T) {
	for _, protocol := range protocols {
		url, c := listen(t, protocol, rooted(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, hijack := w.(http.Hijacker)
			_, from := w.(io.ReaderFrom)
			fmt.Fprint(w, hijack, from)
			if http.NewResponseController(w).EnableFullDuplex() != nil && r.ProtoMajor == 1 {
				t.Error("no full duplex")
			}
		})))
		want := "false false"
		if protocol == "h1" {
			want = "true true"
		}
		if got := ask(t, c, "GET", url+"/", nil); got.body != want {
			t.Errorf("%s: Hijacker, ReaderFrom: %s, want %s", protocol, got.body, want)
		}
	}
}

// TestSendfileIsKept: a file goes to the connection by its own ReadFrom.
func TestSendfileIsKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	used := make(chan bool, 10)
	srv := &http.Server{Handler: rooted(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) }))}
	go srv.Serve(spyListener{l, used})
	defer srv.Close()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	if got := ask(t, &http.Client{Transport: tr}, "GET", "http://"+l.Addr().String()+"/", nil); len(got.body) != 1<<20 {
		t.Errorf("%d bytes", len(got.body))
	}
	select {
	case <-used:
	default:
		t.Error("ReadFrom of the connection was not used")
	}
}

type spyListener struct {
	net.Listener
	used chan bool
}

type spyConn struct {
	*net.TCPConn
	used chan bool
}

func (l spyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return spyConn{c.(*net.TCPConn), l.used}, nil
}

func (c spyConn) ReadFrom(r io.Reader) (int64, error) {
	c.used <- true
	return c.TCPConn.ReadFrom(r)
}

func TestHooks(t *testing.T) {
	hook := func(name string, err error) func(next http.Handler) http.Handler {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				core.FromContext(r.Context()).OnCommit(func(x *core.Exchange) error {
					if x.Committed() {
						t.Error("the hook runs after the commit")
					}
					w.Header().Add("X-Order", name)
					return err
				})
				next.ServeHTTP(w, r)
			})
		}
	}
	fail := errors.New("broken")
	for _, protocol := range protocols {
		for name, h := range map[string]http.HandlerFunc{
			"end":      func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "body") },
			"overflow": func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 9000)) },
			"flush":    func(w http.ResponseWriter, r *http.Request) { w.(http.Flusher).Flush(); io.WriteString(w, "x") },
			"copy":     func(w http.ResponseWriter, r *http.Request) { io.Copy(w, strings.NewReader("x")) },
			"from": func(w http.ResponseWriter, r *http.Request) {
				io.Copy(w, io.LimitReader(strings.NewReader("xyz"), 2)) // no WriterTo
			},
		} {
			t.Run(protocol+"/"+name, func(t *testing.T) {
				url, c := listen(t, protocol, rooted(t, h, core.ValveFunc(hook("outer", nil)), core.ValveFunc(hook("inner", nil))))
				if got := ask(t, c, "GET", url+"/", nil); !slices.Equal(got.header["X-Order"], []string{"inner", "outer"}) || got.status != 200 {
					t.Errorf("status %d, order %v", got.status, got.header["X-Order"])
				}
				url, c = listen(t, protocol, rooted(t, h, core.ValveFunc(hook("outer", fail)), core.ValveFunc(hook("inner", nil))))
				got := ask(t, c, "GET", url+"/", nil)
				if got.status != 503 || got.header.Get("Retry-After") == "" || !strings.HasPrefix(got.body, "503 ") || strings.Contains(got.body, "broken") {
					t.Errorf("failing hook: %d %v %q", got.status, got.header, got.body)
				}
			})
		}
	}
}

// TestHookCannotWrite: a hook that overflows the buffer or flushes gets an error
// instead of a deadlock or a recursion.
func TestHookCannotWrite(t *testing.T) {
	v := core.ValveFunc(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			core.FromContext(r.Context()).OnCommit(func(*core.Exchange) error {
				if err := http.NewResponseController(w).Flush(); err == nil {
					t.Error("a hook could flush")
				}
				return nil
			})
			next.ServeHTTP(w, r)
		})
	})
	if w := do(rooted(t, echo("x"), v), "GET", "h", "/"); w.Code != 200 {
		t.Errorf("status %d", w.Code)
	}
}

func TestPanics(t *testing.T) {
	for _, protocol := range protocols {
		for name, tc := range map[string]struct {
			h      http.HandlerFunc
			status int // 0: the response is cut off
		}{
			"at once": {func(http.ResponseWriter, *http.Request) { panic("secret") }, 500},
			"buffered": {func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(201)
				io.WriteString(w, "half")
				panic("secret")
			}, 500},
			"committed": {func(w http.ResponseWriter, r *http.Request) {
				io.WriteString(w, "half")
				w.(http.Flusher).Flush()
				panic("secret")
			}, 0},
			"abort": {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "half"); panic(http.ErrAbortHandler) }, 0},
			"in a hook": {func(w http.ResponseWriter, r *http.Request) {
				core.FromContext(r.Context()).OnCommit(func(*core.Exchange) error { panic("secret") })
				w.Write(make([]byte, 9000))
			}, 500},
		} {
			t.Run(protocol+"/"+name, func(t *testing.T) {
				url, c := listen(t, protocol, rooted(t, tc.h))
				resp, err := c.Get(url + "/")
				var body []byte
				if err == nil {
					body, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				if tc.status == 0 {
					if err == nil {
						t.Errorf("complete response %d %q, want it cut off", resp.StatusCode, body)
					}
					return
				}
				if err != nil || resp.StatusCode != tc.status || !bytes.HasPrefix(body, []byte("500 ")) || bytes.Contains(body, []byte("secret")) || bytes.Contains(body, []byte("half")) {
					t.Errorf("%v %d %q", err, resp.StatusCode, body)
				}
			})
		}
	}
}

// TestPanicInEndingHook: a hook that panics at the end of the request does not
// leave the session or the context held.
func TestPanicInEndingHook(t *testing.T) {
	table := newMemory()
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		touch(w, r)
		core.FromContext(r.Context()).OnCommit(func(*core.Exchange) error { panic("x") })
	}, nil)
	func() {
		defer func() { _ = recover() }()
		do(e, "GET", "h", "/shop/")
	}()
	if _, _, held := table.state(); held != 0 {
		t.Errorf("%d handles held", held)
	}
	if n := e.Hosts()[0].Contexts()[0].Running(); n != 0 {
		t.Errorf("%d requests running", n)
	}
}

// late is a handler that changes the session after an early commit.
func late(t *testing.T, before, after func(w http.ResponseWriter)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err != nil {
			t.Error(err)
			return
		}
		before(w)
		if err := s.Set("late", 1); err != nil {
			t.Error(err)
		}
		after(w)
	}
}

// TestLateChanges: session changes after an early commit are replicated before
// the client can take the response for complete; if that fails it is cut off.
func TestLateChanges(t *testing.T) {
	chunked := late(t,
		func(w http.ResponseWriter) { io.WriteString(w, "a"); w.(http.Flusher).Flush() },
		func(w http.ResponseWriter) { io.WriteString(w, "b"); w.(http.Flusher).Flush() })
	declared := late(t,
		func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "2")
			io.WriteString(w, "ab")
			w.(http.Flusher).Flush()
		},
		func(w http.ResponseWriter) { w.(http.Flusher).Flush() })
	large := late(t,
		func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", strconv.Itoa(20_000))
			w.Write(make([]byte, 20_000))
		},
		func(w http.ResponseWriter) { w.(http.Flusher).Flush() })
	for _, protocol := range protocols {
		for name, h := range map[string]http.HandlerFunc{"chunked": chunked, "declared": declared, "large": large} {
			t.Run(protocol+"/"+name, func(t *testing.T) {
				table := newMemory()
				synced := func(o *core.ContextOptions) { o.Level = core.Synced }
				url, c := listen(t, protocol, shop(t, table, h, synced))
				got := ask(t, c, "GET", url+"/shop/", nil)
				if got.bodyErr != nil || len(got.body) < 2 {
					t.Errorf("body of %d bytes, %v", len(got.body), got.bodyErr)
				}
				if commits, _, _ := table.state(); !slices.Equal(commits, []core.Level{core.Synced, core.Synced}) {
					t.Errorf("commits %v", commits)
				}
				// Now the second one fails.
				failing := func(w http.ResponseWriter, r *http.Request) {
					h(w, r)
					table.setFail(errReplication)
				}
				table.setFail(nil)
				url, c = listen(t, protocol, shop(t, table, failing, synced))
				req, _ := http.NewRequest("GET", url+"/shop/", nil)
				resp, err := c.Do(req)
				if err == nil {
					_, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				if err == nil {
					t.Error("the client got a complete response although its changes were not replicated")
				}
			})
		}
	}
}

func TestWebSocket(t *testing.T) {
	table := newMemory()
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		s, err := session.From(r)
		if err != nil {
			t.Error(err)
			return
		}
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		defer c.CloseNow()
		for {
			kind, msg, err := c.Read(r.Context())
			if err != nil {
				break
			}
			if err := s.Set("last", string(msg)); err != nil {
				t.Error(err)
			}
			if err := c.Write(r.Context(), kind, msg); err != nil {
				t.Error(err)
			}
		}
	}, nil)
	url, hc := listen(t, "h1", e)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, resp, err := websocket.Dial(ctx, url+"/shop/ws", &websocket.DialOptions{HTTPClient: hc})
	if err != nil {
		t.Fatal(err)
	}
	cookies := resp.Cookies()
	if len(cookies) != 1 || cookies[0].Name != "JSESSIONID" {
		t.Errorf("cookies in the 101: %v", resp.Header)
	}
	for _, msg := range []string{"one", strings.Repeat("two", 10_000)} {
		if err := c.Write(ctx, websocket.MessageText, []byte(msg)); err != nil {
			t.Fatal(err)
		}
		if _, got, err := c.Read(ctx); err != nil || string(got) != msg {
			t.Errorf("echo of %d bytes: %d, %v", len(msg), len(got), err)
		}
	}
	if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Error(err)
	}
	waitReleased(t, table)
	if commits, _, _ := table.state(); len(commits) == 0 {
		t.Error("what the socket changed was not handed over")
	}
}

// waitReleased waits until no handle is held.
func waitReleased(t *testing.T, table *memory) {
	t.Helper()
	deadline := time.After(5 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if _, _, held := table.state(); held == 0 {
			return
		}
		select {
		case <-deadline:
			t.Fatal("a handle is still held")
		case <-tick.C:
		}
	}
}

// TestRawUpgrade: a handler that writes the 101 itself, as some libraries do.
func TestRawUpgrade(t *testing.T) {
	e := shop(t, newMemory(), func(w http.ResponseWriter, r *http.Request) {
		if _, err := session.From(r); err != nil {
			t.Error(err)
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Errorf("hijack: %v", err)
			return
		}
		defer conn.Close()
		fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
		rw.Flush()
		line, _ := rw.ReadString('\n')
		fmt.Fprint(conn, line)
		if _, err := w.Write([]byte("x")); !errors.Is(err, http.ErrHijacked) {
			t.Errorf("write after hijack: %v", err)
		}
	}, nil)
	url, _ := listen(t, "h1", e)
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /shop/ HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 101 || len(resp.Cookies()) != 1 || resp.Header.Get("Upgrade") != "echo" {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
	fmt.Fprint(conn, "hello\n")
	if line, err := in.ReadString('\n'); line != "hello\n" {
		t.Errorf("echo %q, %v", line, err)
	}
}

// TestHijackWithFailingHook: no takeover of the connection when the session
// could not be stored.
func TestHijackWithFailingHook(t *testing.T) {
	table := newMemory()
	table.setFail(errReplication)
	e := shop(t, table, func(w http.ResponseWriter, r *http.Request) {
		touch(w, r)
		if _, _, err := w.(http.Hijacker).Hijack(); !errors.Is(err, errReplication) {
			t.Errorf("hijack: %v", err)
		}
	}, func(o *core.ContextOptions) { o.Level = core.Synced })
	url, c := listen(t, "h1", e)
	if got := ask(t, c, "GET", url+"/shop/", nil); got.status != 503 {
		t.Errorf("status %d", got.status)
	}
}

func TestErrorPage(t *testing.T) {
	page := func(w http.ResponseWriter, x *core.Exchange, status int, message string) {
		fmt.Fprintf(w, "page %d %s", status, message)
	}
	v := core.ValveFunc(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			core.FromContext(r.Context()).SetErrorPage(page)
			next.ServeHTTP(w, r)
		})
	})
	for name, tc := range map[string]struct {
		h      http.HandlerFunc
		status int
		body   string
	}{
		"bare": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(403) }, 403, "page 403 "},
		"body": {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "mine", http.StatusForbidden) }, 403, "mine\n"},
		"empty": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "0")
			w.WriteHeader(403)
		}, 403, ""},
		"success": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(201) }, 201, ""},
		"panic":   {func(w http.ResponseWriter, r *http.Request) { panic("secret") }, 500, "page 500 the application failed on this request"},
	} {
		if w := do(rooted(t, tc.h, v), "GET", "h", "/"); w.Code != tc.status || w.Body.String() != tc.body {
			t.Errorf("%s: %d %q", name, w.Code, w.Body)
		}
	}
	if w := do(rooted(t, echo("x"), v), "GET", "h", "/.."); w.Code != 400 || !strings.HasPrefix(w.Body.String(), "page 400 ") {
		t.Errorf("bad path: %d %q", w.Code, w.Body)
	}
}

// TestExchangeFacts: what logging valves rely on.
func TestExchangeFacts(t *testing.T) {
	for name, tc := range map[string]struct {
		h         http.HandlerFunc
		status    int
		written   int64
		committed bool
	}{
		"nothing": {func(http.ResponseWriter, *http.Request) {}, 200, 0, true},
		"created": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(201); io.WriteString(w, "abc") }, 201, 3, true},
		"big":     {func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 30_000)) }, 200, 30_000, true},
		"copied": {func(w http.ResponseWriter, r *http.Request) {
			io.Copy(w, io.LimitReader(strings.NewReader("abcdef"), 5))
		}, 200, 5, true},
	} {
		ended := 0
		v := core.ValveFunc(func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				core.FromContext(r.Context()).OnEnd(func(x *core.Exchange) {
					ended++
					if x.Status() != tc.status || x.Written() != tc.written || x.Committed() != tc.committed {
						t.Errorf("%s: status %d, written %d, committed %v", name, x.Status(), x.Written(), x.Committed())
					}
				})
				next.ServeHTTP(w, r)
			})
		})
		do(rooted(t, tc.h, v), "GET", "h", "/")
		if ended != 1 {
			t.Errorf("%s: the end was reported %d times", name, ended)
		}
	}
}

// TestContextIsTransparent: cancellation and values of the server's context
// pass through the exchange.
func TestContextIsTransparent(t *testing.T) {
	type key struct{}
	ctx, cancel := context.WithCancelCause(context.WithValue(t.Context(), key{}, "v"))
	why := errors.New("client left")
	e := rooted(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		child, stop := context.WithTimeout(r.Context(), time.Minute)
		defer stop()
		if child.Value(key{}) != "v" || core.FromContext(child) == nil {
			t.Error("values are lost")
		}
		cancel(why)
		<-child.Done()
		if !errors.Is(context.Cause(child), why) {
			t.Errorf("cause %v", context.Cause(child))
		}
	}))
	e.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "GET", "/", nil))
	if core.FromContext(t.Context()) != nil {
		t.Error("an exchange outside an engine")
	}
}

// TestCounters: each refused input increases one counter.
func TestCounters(t *testing.T) {
	m := channel.NewMetrics()
	table := newMemory()
	e, err := core.NewEngine(core.EngineOptions{Route: "n1", Hosts: []core.HostOptions{{Name: "h", Contexts: []core.ContextOptions{
		{Path: "/a", Handler: http.HandlerFunc(touch), Sessions: table, Distributable: true, Level: core.Synced},
		{Path: "/p", Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("x") })},
	}}}}, channel.Settings{Metrics: m})
	if err != nil {
		t.Fatal(err)
	}
	read := func() map[string]float64 {
		out := map[string]float64{}
		for _, s := range m.Samples() {
			if s.Name != "http_requests_total" {
				out[s.Name] = s.Value
			}
		}
		return out
	}
	for name, f := range map[string]func(){
		"http_bad_paths_total":       func() { do(e, "GET", "h", "/a/%00") },
		"http_unrouted_total":        func() { do(e, "GET", "h", "/x") },
		"http_panics_total":          func() { do(e, "GET", "h", "/p/") },
		"http_bad_session_ids_total": func() { do(e, "GET", "h", "/a/", "Cookie", "JSESSIONID=x") },
		"http_commit_failures_total": func() {
			table.setFail(errReplication)
			do(e, "GET", "h", "/a/")
			table.setFail(nil)
		},
	} {
		before := read()
		f()
		for n, v := range read() {
			if want := before[n]; n == name && v != want+1 || n != name && v != want {
				t.Errorf("%s: %s went from %v to %v", name, n, want, v)
			}
		}
	}
}
