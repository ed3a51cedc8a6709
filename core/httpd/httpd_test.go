package httpd

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2/stdnet"
)

func settings(t *testing.T) channel.Settings {
	t.Helper()
	n, err := stdnet.NewNet()
	if err != nil {
		t.Fatal(err)
	}
	return channel.Settings{Net: n, Name: "test", Metrics: channel.NewMetrics()}
}

// start starts a connector on a free port.
func start(t *testing.T, c Config, h http.HandlerFunc) *Connector {
	t.Helper()
	if c.Address == "" {
		c.Address = "127.0.0.1:0"
	}
	k, err := New(c, h, settings(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Stop(context.Background()) })
	return k
}

func client(t *testing.T, protocols func(*http.Protocols), c *tls.Config) *http.Client {
	t.Helper()
	tr := &http.Transport{Protocols: new(http.Protocols), TLSClientConfig: c}
	protocols(tr.Protocols)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func h1(p *http.Protocols)  { p.SetHTTP1(true) }
func h2(p *http.Protocols)  { p.SetHTTP2(true) }
func h2c(p *http.Protocols) { p.SetUnencryptedHTTP2(true) }

func get(c *http.Client, url string) (string, error) {
	resp, err := c.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func proto(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto, " ", r.TLS != nil) }

// authority makes certificates for the tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key, pool: x509.NewCertPool()}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pool.AddCert(a.cert)
	return a
}

// issue writes a certificate and its key, and the authority's certificate.
func (a *authority) issue(t *testing.T, dir string) (cert, key, ca string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "node"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &k.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, b []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", keyDER), write("ca.pem", "CERTIFICATE", a.cert.Raw)
}

func TestProtocols(t *testing.T) {
	a := newAuthority(t)
	cert, key, ca := a.issue(t, t.TempDir())
	roots := &tls.Config{RootCAs: a.pool}
	own, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		c       Config
		scheme  string
		client  *http.Client
		want    string // empty: refused
		wantErr string
	}{
		{"http", Config{}, "http", client(t, h1, nil), "HTTP/1.1 false", ""},
		{"http refuses h2c", Config{}, "http", client(t, h2c, nil), "", ""},
		{"h2c with HTTP/1.1", Config{Protocol: H2C}, "http", client(t, h1, nil), "HTTP/1.1 false", ""},
		{"h2c", Config{Protocol: H2C}, "http", client(t, h2c, nil), "HTTP/2.0 false", ""},
		{"tls", Config{TLS: &TLS{Cert: cert, Key: key}}, "https", client(t, h1, roots), "HTTP/1.1 true", ""},
		{"tls with HTTP/2", Config{TLS: &TLS{Cert: cert, Key: key}}, "https", client(t, h2, roots), "HTTP/2.0 true", ""},
		{"no client certificate", Config{TLS: &TLS{Cert: cert, Key: key, ClientCA: ca}}, "https", client(t, h1, roots), "", ""},
		{"client certificate", Config{TLS: &TLS{Cert: cert, Key: key, ClientCA: ca}}, "https",
			client(t, h1, &tls.Config{RootCAs: a.pool, Certificates: []tls.Certificate{own}}), "HTTP/1.1 true", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := start(t, tc.c, proto)
			got, err := get(tc.client, k.Scheme()+"://"+k.Addr())
			if got != tc.want || (err == nil) != (tc.want != "") {
				t.Errorf("%q, %v; want %q", got, err, tc.want)
			}
			if k.Scheme() != tc.scheme {
				t.Errorf("scheme %s", k.Scheme())
			}
			tc.client.CloseIdleConnections()
			if err := k.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestBadConfig(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []Config{
		{Protocol: "ftp"}, {Protocol: "ajp"}, {Address: "8080"}, {NextFree: -1}, {MaxHeaderBytes: 10}, {MaxConnections: -1}, {HeaderTimeout: -1},
		{TLS: &TLS{}}, {Protocol: H2C, TLS: &TLS{Cert: "a", Key: "b"}},
	} {
		if _, err := New(c, http.HandlerFunc(proto), settings(t)); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
	if _, err := New(Config{}, http.HandlerFunc(proto), channel.Settings{}); err == nil {
		t.Error("no network was accepted")
	}
	if _, err := New(Config{}, nil, settings(t)); err == nil {
		t.Error("no handler was accepted")
	}
	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cert, key, _ := newAuthority(t).issue(t, dir)
	for _, c := range []TLS{{Cert: empty, Key: empty}, {Cert: filepath.Join(dir, "none"), Key: key}, {Cert: cert, Key: key, ClientCA: empty}, {Cert: cert, Key: key, ClientCA: "none"}} {
		k, err := New(Config{Address: "127.0.0.1:0", TLS: &c}, http.HandlerFunc(proto), settings(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Start(t.Context()); err == nil || !strings.Contains(err.Error(), dir) && !strings.Contains(err.Error(), "none") {
			t.Errorf("%+v: %v", c, err)
		}
		if err := k.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestTakenPort(t *testing.T) {
	first := start(t, Config{}, proto)
	k, err := New(Config{Address: first.Addr()}, http.HandlerFunc(proto), settings(t))
	if err != nil {
		t.Fatal(err)
	}
	err = k.Start(t.Context())
	if err == nil || !channel.IsAddrInUse(err) {
		t.Fatalf("taken port: %v", err)
	}
	for _, part := range []string{first.Addr(), "taken by", "next_free", "this process itself"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error does not say %q: %v", part, err)
		}
	}
	next := start(t, Config{Address: first.Addr(), NextFree: 50}, proto)
	if next.Addr() == first.Addr() || !strings.HasPrefix(next.Addr(), "127.0.0.1:") {
		t.Errorf("next free address %s, taken %s", next.Addr(), first.Addr())
	}
	if got, err := get(client(t, h1, nil), "http://"+next.Addr()); got != "HTTP/1.1 false" {
		t.Errorf("%q, %v", got, err)
	}
	k, err = New(Config{Address: "192.0.2.1:0"}, http.HandlerFunc(proto), settings(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "choose an address of this machine") {
		t.Errorf("foreign address: %v", err)
	}
}

func TestAllAddresses(t *testing.T) {
	for _, host := range []string{"", "*", "0.0.0.0", "localhost"} {
		k := start(t, Config{Address: host + ":0"}, proto)
		_, port, err := net.SplitHostPort(k.Addr())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := get(client(t, h1, nil), "http://127.0.0.1:"+port); got != "HTTP/1.1 false" {
			t.Errorf("%q: %q, %v", host, got, err)
		}
	}
}

func TestLife(t *testing.T) {
	k, err := New(Config{Address: "127.0.0.1:0"}, http.HandlerFunc(proto), settings(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := k.Stop(t.Context()); err != nil {
			t.Errorf("stop without start: %v", err)
		}
	}
	if err := k.Start(t.Context()); err == nil {
		t.Error("started after stop")
	}
	k = start(t, Config{}, proto)
	if err := k.Start(t.Context()); err == nil {
		t.Error("started twice")
	}
	for range 2 {
		if err := k.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// TestDrain: FT-18: requests that run end, WebSockets get a signal and
// are closed, silent connections do not hold up anything, new ones are refused.
func TestDrain(t *testing.T) {
	const requests, sockets = 1000, 100
	var inside, ended sync.WaitGroup
	inside.Add(requests + sockets)
	ended.Add(sockets)
	proceed := make(chan struct{})
	var cancelled atomic.Int64
	k := start(t, Config{}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ws" {
			c, err := websocket.Accept(w, r, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.CloseNow()
			defer ended.Done()
			inside.Done()
			if _, _, err := c.Read(r.Context()); errors.Is(err, context.Canceled) {
				cancelled.Add(1)
			}
			return
		}
		inside.Done()
		<-proceed
		io.WriteString(w, "done")
	})
	silent, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c := client(t, h1, nil)
	results := make(chan error, requests)
	for range requests {
		go func() {
			got, err := get(c, "http://"+k.Addr()+"/")
			if err == nil && got != "done" {
				err = fmt.Errorf("body %q", got)
			}
			results <- err
		}()
	}
	for range sockets {
		ws, _, err := websocket.Dial(t.Context(), "ws://"+k.Addr()+"/ws", &websocket.DialOptions{HTTPClient: c})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
	}
	inside.Wait()
	stopped := make(chan error)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		stopped <- k.Stop(ctx)
	}()
	// The listener closes first; only then the requests may end.
	for {
		conn, err := net.Dial("tcp", k.Addr())
		if err != nil {
			break
		}
		conn.Close()
	}
	close(proceed)
	for range requests {
		if err := <-results; err != nil {
			t.Errorf("a running request was lost: %v", err)
		}
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	ended.Wait()
	if n := cancelled.Load(); n != sockets {
		t.Errorf("%d of %d sockets got the signal", n, sockets)
	}
	if n := k.Connections(); n != 0 {
		t.Errorf("%d connections left", n)
	}
}

// TestStopTimeIsOver: a handler that does not end is cancelled, and Stop says so.
func TestStopTimeIsOver(t *testing.T) {
	inside := make(chan struct{})
	k := start(t, Config{}, func(w http.ResponseWriter, r *http.Request) {
		close(inside)
		<-r.Context().Done()
	})
	go get(client(t, h1, nil), "http://"+k.Addr())
	<-inside
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := k.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop: %v", err)
	}
}

func TestMaxConnections(t *testing.T) {
	k := start(t, Config{MaxConnections: 2}, proto)
	var conns []net.Conn
	ask := func() net.Conn {
		c, err := net.Dial("tcp", k.Addr())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		return c
	}
	for range 2 {
		c := ask()
		conns = append(conns, c)
		if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
			t.Fatal(err)
		}
	}
	third := ask()
	defer third.Close()
	answered := make(chan error)
	go func() {
		_, err := http.ReadResponse(bufio.NewReader(third), nil)
		answered <- err
	}()
	for k.full.Value() == 0 { // the listener has noticed that it is full
		select {
		case err := <-answered:
			t.Fatalf("a third connection was served beside two: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	if n := k.Connections(); n != 2 {
		t.Errorf("%d connections", n)
	}
	conns[0].Close()
	if err := <-answered; err != nil {
		t.Errorf("after one was closed: %v", err)
	}
	conns[1].Close()
}

// TestLimits: a slow or huge header does not hold a connection.
func TestLimits(t *testing.T) {
	k := start(t, Config{HeaderTimeout: 50 * time.Millisecond, MaxHeaderBytes: 1024}, proto)
	slow, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	fmt.Fprint(slow, "GET / HTTP/1.1\r\nHost: h\r\n")
	if b, err := io.ReadAll(slow); err != nil || len(b) > 0 && !strings.Contains(string(b), "408") {
		t.Errorf("slow header: %q, %v", b, err)
	}
	big, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer big.Close()
	fmt.Fprintf(big, "GET / HTTP/1.1\r\nHost: h\r\nCookie: %s\r\n\r\n", strings.Repeat("a", 64<<10))
	resp, err := http.ReadResponse(bufio.NewReader(big), nil)
	if err != nil || resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("huge header: %v, %v", resp, err)
	}
	tlsNoise, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer tlsNoise.Close()
	fmt.Fprint(tlsNoise, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
	resp, err = http.ReadResponse(bufio.NewReader(tlsNoise), nil)
	if err != nil || resp.StatusCode != 400 {
		t.Errorf("a TLS hello: %v, %v", resp, err)
	}
}
