package conformance

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
	"github.com/longhouse-go/longhouse/core/table"
)

// ValveSubject is a valve.
type ValveSubject interface {
	Subject
	// Valve makes an instance.
	Valve(t *T, s channel.Settings) (core.Valve, error)
}

type valve struct {
	name   string
	new    func(channel.Settings) (core.Valve, error)
	config json.RawMessage
}

// Valve is the subject of a valve's constructor, with the configuration to try.
func Valve[C any, V core.Valve](name string, newFn func(C, channel.Settings) (V, error), cfg C) Subject {
	return &valve{name: name, config: configJSON(cfg), new: func(s channel.Settings) (core.Valve, error) { return newFn(cfg, s) }}
}

// ValveOf is the subject of a factory, with options as YAML.
func ValveOf(f core.ValveFactory, options string) Subject {
	return &valve{name: f.Name, new: func(s channel.Settings) (core.Valve, error) {
		return f.New(yamlOptions(options), s)
	}}
}

// Describe implements Subject.
func (v *valve) Describe() (Description, error) {
	return Description{Kind: ProfileValve, Name: v.name, Details: v.config}, nil
}

// Valve implements ValveSubject.
func (v *valve) Valve(_ *T, s channel.Settings) (core.Valve, error) { return v.new(s) }

// yamlOptions decodes options strictly, as a node does.
func yamlOptions(options string) channel.Decode {
	return func(into any) error {
		if options == "" {
			return nil
		}
		return config.Decode([]byte(options), "options", into)
	}
}

// digestOf names a body in messages.
func digestOf(b []byte) string { return fmt.Sprintf("%d bytes %x", len(b), sha256.Sum256(b)) }

// serve serves an application behind the subject, or behind nothing at all if
// bare, in an engine on the loopback interface. The server ends with the check.
func (t *T) serve(bare bool, app http.HandlerFunc) *httptest.Server {
	t.Helper()
	var list []core.Valve
	if !bare {
		s, ok := t.Subject.(ValveSubject)
		if !ok {
			t.Fatalf("a %T is no valve", t.Subject)
		}
		v, err := s.Valve(t, channel.Settings{Name: "subject", Logger: zap.NewNop(), Metrics: channel.NewMetrics(), WorkDir: t.TempDir()})
		if err != nil {
			t.Fatalf("make the subject: %v", err)
		}
		list = append(list, v)
	}
	engine, err := core.NewEngine(core.EngineOptions{
		Name: "conformance", Valves: list, Shared: table.New(table.Config{}, channel.Settings{}),
		Hosts: []core.HostOptions{{Name: "localhost", Contexts: []core.ContextOptions{{Handler: app}}}},
	}, channel.Settings{})
	if err != nil {
		t.Fatalf("an engine with the subject: %v", err)
	}
	if err := engine.Start(t.Context()); err != nil {
		t.Fatalf("start of an engine with the subject: %v", err)
	}
	server := httptest.NewUnstartedServer(engine)
	server.Config.ErrorLog = zap.NewStdLog(zap.NewNop())
	server.Start()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
		ctx, cancel := context.WithTimeout(context.Background(), t.Timeouts.Stop)
		defer cancel()
		if err := engine.Stop(ctx); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	return server
}

// dial opens a connection to the server that ends with the check, at the latest
// after Timeouts.Event.
func (t *T) dial(server *httptest.Server) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", server.Listener.Addr().String())
	if err == nil {
		err = c.SetDeadline(time.Now().Add(t.Timeouts.Event))
	}
	if err != nil {
		t.Fatalf("connect to the server: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// await fails the check if ch does not deliver within Timeouts.Event.
func await[V any](t *T, what string, ch <-chan V) V {
	t.Helper()
	timer := time.NewTimer(t.Timeouts.Event)
	defer timer.Stop()
	select {
	case v := <-ch:
		return v
	case <-timer.C:
		t.Fatalf("not within %v: %s", t.Timeouts.Event, what)
		panic("unreachable")
	}
}

// exchangeCase is one request and an answer to it.
type exchangeCase struct {
	name, method, target, body string
	header                     http.Header
	app                        http.HandlerFunc
}

func transparentCases() []exchangeCase {
	big := strings.Repeat("0123456789abcdef", 64<<10)
	text := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	return []exchangeCase{
		{name: "plain", app: text(200, "hello")},
		{name: "headers", header: http.Header{"X-In": {"one", "two"}, "Cookie": {"a=b"}}, app: func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Set-Cookie"] = []string{"a=1; Path=/", "b=2; Path=/"}
			w.Header()["X-Multi"] = []string{"one", "two"}
			w.Header().Set("Content-Length", "2")
			_, _ = io.WriteString(w, "ok")
		}},
		{name: "chunked", app: func(w http.ResponseWriter, _ *http.Request) {
			for range 3 {
				_, _ = io.WriteString(w, "part ")
				_ = http.NewResponseController(w).Flush()
			}
		}},
		{name: "large", app: text(200, big)},
		{name: "nothing", app: func(http.ResponseWriter, *http.Request) {}},
		{name: "no content", app: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }},
		{name: "not modified", app: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			w.WriteHeader(304)
		}},
		{name: "redirect", app: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }},
		{name: "error with a page", app: text(404, "my own page")},
		{name: "head", method: http.MethodHead, app: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "12345")
		}},
		{name: "query", target: "/a%2Fb/c?q=1&q=%20x", app: text(200, "ok")},
		{name: "post", method: http.MethodPost, body: big, app: func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(w, r.Body)
		}},
		{name: "early hints", app: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(103)
			w.Header().Del("Link")
			_, _ = io.WriteString(w, "ok")
		}},
		{name: "trailers", app: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "X-Sum")
			_, _ = io.WriteString(w, "body")
			_ = http.NewResponseController(w).Flush()
			w.Header().Set("X-Sum", "42")
			w.Header().Set(http.TrailerPrefix+"X-Late", "yes")
		}},
	}
}

// seen writes down the request as the application sees it.
func seen(r *http.Request, body []byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s host %s length %d encoding %v body %s", r.Method, r.RequestURI, r.Host, r.ContentLength, r.TransferEncoding, digestOf(body))
	writeHeader(&b, "header", r.Header)
	writeHeader(&b, "trailer", r.Trailer)
	return b.String()
}

func writeHeader(b *strings.Builder, what string, h http.Header) {
	names := make([]string, 0, len(h))
	for name := range h {
		if name != "Date" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(b, "\n%s %s: %q", what, name, h[name])
	}
}

// observe makes the request of a case and writes down all that both sides see.
func (t *T) observe(bare bool, c exchangeCase) string {
	t.Helper()
	inside := make(chan string, 1)
	server := t.serve(bare, func(w http.ResponseWriter, r *http.Request) {
		var body []byte
		if r.Body != nil {
			body, _ = io.ReadAll(r.Body)
			r.Body = io.NopCloser(bytes.NewReader(body))
		}
		select {
		case inside <- seen(r, body):
		default:
		}
		c.app(w, r)
	})
	var b strings.Builder
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		fmt.Fprintf(&b, "informational %d", code)
		writeHeader(&b, "header", http.Header(h))
		b.WriteByte('\n')
		return nil
	}}
	ctx, cancel := context.WithTimeout(httptrace.WithClientTrace(t.Context(), trace), t.Timeouts.Call)
	defer cancel()
	target := c.target
	if target == "" {
		target = "/conformance"
	}
	req, err := http.NewRequestWithContext(ctx, cmpOr(c.method, http.MethodGet), "http://localhost"+target, strings.NewReader(c.body))
	if err != nil {
		t.Fatal(err)
	}
	for name, values := range c.header {
		req.Header[name] = values
	}
	addr := server.Listener.Addr().String()
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Errorf("%s: %v", c.name, err)
		return b.String()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	fmt.Fprintf(&b, "status %d length %d encoding %v body %s error %v", resp.StatusCode, resp.ContentLength, resp.TransferEncoding, digestOf(body), err)
	writeHeader(&b, "header", resp.Header)
	writeHeader(&b, "trailer", resp.Trailer)
	select {
	case s := <-inside:
		fmt.Fprintf(&b, "\nthe application saw %s", s)
	default:
		b.WriteString("\nthe application was not called")
	}
	return b.String()
}

func cmpOr(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// difference returns the first line in which two texts differ.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		a, b := "nothing", "nothing"
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			b = g[i]
		}
		if a != b {
			return fmt.Sprintf("%.200s, without the valve %.200s", b, a)
		}
	}
	return ""
}

func valveTransparent(t *T) {
	for _, c := range transparentCases() {
		want, got := t.observe(true, c), t.observe(false, c)
		if d := difference(want, got); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
		t.Event("%s same", c.name)
	}
}

func valveController(t *T) {
	type attempt struct {
		name string
		err  error
	}
	tried := make(chan attempt, 8)
	server := t.serve(false, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		soon := time.Now().Add(t.Timeouts.Event)
		switch r.URL.Path {
		case "/hijack":
			c, rw, err := rc.Hijack()
			tried <- attempt{"hijack", err}
			if err != nil {
				return
			}
			defer c.Close()
			line, _ := rw.ReadString('\n')
			_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\nyou said " + line)
			_ = rw.Flush()
		case "/duplex":
			tried <- attempt{"full duplex", rc.EnableFullDuplex()}
			w.WriteHeader(200)
			line := bufio.NewReader(r.Body)
			for {
				_ = rc.Flush()
				s, err := line.ReadString('\n')
				if err != nil {
					return
				}
				_, _ = io.WriteString(w, "echo "+s)
			}
		default:
			tried <- attempt{"read deadline", rc.SetReadDeadline(soon)}
			tried <- attempt{"write deadline", rc.SetWriteDeadline(soon)}
			_, _ = io.WriteString(w, "part")
			tried <- attempt{"flush", rc.Flush()}
		}
	})
	note := func(n int) {
		for range n {
			if a := await(t, "the application has tried the controller", tried); a.err != nil {
				t.Errorf("%s: %v", a.name, a.err)
			}
		}
	}

	c := t.dial(server)
	fmt.Fprint(c, "GET /other HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
	note(3)
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("after a flush: %v", err)
	}

	c = t.dial(server)
	fmt.Fprint(c, "GET /hijack HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	fmt.Fprint(c, "hello\n")
	note(1)
	if t.Failed() {
		return // the client would wait for answers in vain
	}
	if b, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(b), "\r\n\r\nyou said hello\n") {
		t.Errorf("on a hijacked connection the client read %q, %v", b, err)
	}

	c = t.dial(server)
	fmt.Fprint(c, "POST /duplex HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
	note(1)
	r := bufio.NewReader(c)
	for i := range 3 {
		fmt.Fprintf(c, "6\r\nline%d\n\r\n", i)
		if err := readUntil(r, "echo line"+strconv.Itoa(i)); err != nil {
			t.Fatalf("full duplex: line %d is not answered while the request goes on: %v", i, err)
		}
	}
	fmt.Fprint(c, "0\r\n\r\n")
}

// readUntil reads lines until one has the text.
func readUntil(r *bufio.Reader, text string) error {
	for {
		line, err := r.ReadString('\n')
		if strings.Contains(line, text) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

const (
	// streamChunk and streamSize are what the application writes at once and
	// before it waits for the client, in bytes. streamSize is more than sockets
	// and the container keep.
	streamChunk = 64 << 10
	streamSize  = 24 << 20
)

func valveStreaming(t *T) {
	proceed := make(chan struct{}, 1)
	sent := make(chan int, 1)
	server := t.serve(false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/first" {
			_, _ = io.WriteString(w, "first byte")
			_ = http.NewResponseController(w).Flush()
			select {
			case <-proceed:
			case <-r.Context().Done():
			}
			_, _ = io.WriteString(w, ", last byte")
			return
		}
		// The client reads nothing until this stops: a writer that is not
		// blocked fills some buffer.
		chunk, n := make([]byte, streamChunk), 0
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(5 * t.Timeouts.Quiet))
		for n < streamSize {
			m, err := w.Write(chunk)
			n += m
			if err != nil {
				break
			}
		}
		sent <- n
	})
	c := t.dial(server)
	fmt.Fprint(c, "GET /first HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
	r := bufio.NewReader(c)
	var got []byte
	for !bytes.Contains(got, []byte("first byte")) {
		b, err := r.ReadByte()
		if err != nil {
			t.Errorf("the first bytes do not come before the last ones are written: %v", err)
			break
		}
		got = append(got, b)
	}
	proceed <- struct{}{}
	if rest, err := io.ReadAll(r); err != nil || !bytes.Contains(rest, []byte(", last byte")) {
		t.Errorf("the rest of the body is %q, %v", rest, err)
	}

	c = t.dial(server)
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetReadBuffer(streamChunk)
	}
	fmt.Fprint(c, "GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
	if n := await(t, "the application has written until it could not any more", sent); n >= streamSize {
		t.Errorf("the application could write %d bytes that nobody reads: they are buffered", n)
	}
}

func valvePanic(t *T) {
	server := t.serve(false, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/after":
			_, _ = io.WriteString(w, "half of it")
			_ = http.NewResponseController(w).Flush()
			panic("conformance: deliberate")
		case "/abort":
			panic(http.ErrAbortHandler)
		case "/before":
			w.Header().Set("X-Mine", "1")
			panic("conformance: deliberate")
		}
		_, _ = io.WriteString(w, "alive")
	})
	get := func(path string) string {
		c := t.dial(server)
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", path)
		b, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: %v", path, err)
		}
		return string(b)
	}
	one := func(path, raw string) {
		if n := strings.Count(raw, "HTTP/1."); n > 1 {
			t.Errorf("%s: %d responses to one request: %.300q", path, n, raw)
		}
	}
	if raw := get("/before"); raw != "" {
		one("/before", raw)
		if status, _, _ := strings.Cut(strings.TrimPrefix(raw, "HTTP/1.1 "), " "); !strings.HasPrefix(status, "5") {
			t.Errorf("a panic is answered with %.80q, not with an error", raw)
		}
	}
	raw := get("/after")
	one("/after", raw)
	if strings.HasSuffix(raw, "\r\n0\r\n\r\n") || strings.Contains(raw, "Content-Length") {
		t.Errorf("a response that a panic cut off looks complete: %.300q", raw)
	}
	if raw := get("/abort"); raw != "" {
		t.Errorf("http.ErrAbortHandler asks for no answer; it got %.300q", raw)
	}
	if raw := get("/"); !strings.HasSuffix(raw, "alive") && !strings.Contains(raw, "alive\r\n") {
		t.Errorf("the request after the panics got %.300q", raw)
	}
}

func valveCancel(t *T) {
	type probe struct{ inside, gone chan struct{} }
	for _, wrote := range []bool{false, true} {
		p := probe{make(chan struct{}), make(chan struct{})}
		end := make(chan struct{})
		server := t.serve(false, func(w http.ResponseWriter, r *http.Request) {
			if wrote {
				_, _ = io.WriteString(w, "part")
				_ = http.NewResponseController(w).Flush()
			}
			close(p.inside)
			select {
			case <-r.Context().Done():
				close(p.gone)
			case <-end:
			}
		})
		c := t.dial(server)
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
		func() {
			defer close(end)
			await(t, "the application has been called", p.inside)
			c.Close()
			await(t, "the request's context ends when the client has gone", p.gone)
		}()
	}
}

func valveChecks() []Check {
	const source = "net/http: ResponseWriter, ResponseController; DESIGN §5: one response wrapper"
	return []Check{
		{
			ID: "valve/transparent", Profile: ProfileValve, Level: Must,
			Requirement: "Status, headers, trailers, body, length and 1xx pass unchanged when the valve has nothing to do.",
			Source:      source, Run: valveTransparent, Saboteurs: valveSaboteurs("transparent"),
		}, {
			ID: "valve/controller", Profile: ProfileValve, Level: Must,
			Requirement: "Flush, hijack, deadlines and full duplex still work through http.ResponseController.",
			Source:      source, Run: valveController, Saboteurs: valveSaboteurs("controller"),
		}, {
			ID: "valve/streaming", Profile: ProfileValve, Level: Must,
			Requirement: "The first byte is not delayed, and large bodies are not buffered.",
			Source:      source, Run: valveStreaming, Saboteurs: valveSaboteurs("streaming"),
		}, {
			ID: "valve/panic", Profile: ProfileValve, Level: Must,
			Requirement: "A panic behind the valve is passed on or turned into one error response, never two.",
			Source:      "net/http: Handler, ErrAbortHandler", Run: valvePanic, Saboteurs: valveSaboteurs("panic"),
		}, {
			ID: "valve/cancel", Profile: ProfileValve, Level: Must,
			Requirement: "A client that disconnects ends the context of the request.",
			Source:      "net/http: Request.Context", Run: valveCancel, Saboteurs: valveSaboteurs("cancel"),
		},
	}
}
