package httpd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// Protocols of a connector.
const (
	// HTTP is HTTP/1.1, and HTTP/2 by ALPN if TLS is set.
	HTTP = "http"
	// H2C is HTTP/1.1 and HTTP/2, both without TLS.
	H2C = "h2c"
)

// Defaults and bounds of Config.
const (
	DefaultAddress        = "127.0.0.1:8080"
	DefaultHeaderTimeout  = 10 * time.Second
	DefaultIdleTimeout    = 60 * time.Second
	DefaultMaxHeaderBytes = 64 << 10
	DefaultMaxConnections = 10_000
	maxNextFree           = 1000
)

// Config describes one connector. Zero values mean the defaults.
type Config struct {
	// Protocol is HTTP or H2C; default HTTP.
	Protocol string
	// Address is host:port; an empty host means all addresses. Port 0 is one
	// that the system chooses.
	Address string
	// NextFree tries up to that many further ports if the port is taken.
	NextFree int
	// TLS switches TLS on; nil is without.
	TLS *TLS
	// HeaderTimeout bounds reading a request's header.
	HeaderTimeout time.Duration
	// IdleTimeout closes kept-alive connections.
	IdleTimeout time.Duration
	// MaxHeaderBytes bounds a request's header; net/http grants 4 KiB more.
	MaxHeaderBytes int
	// MaxConnections bounds the open connections, those of WebSockets included.
	// More wait in the system's queue until one closes.
	MaxConnections int
}

// TLS names the files of a certificate, in PEM form.
type TLS struct {
	// Cert holds the certificate and its chain, Key the private key.
	Cert, Key string
	// ClientCA, when set, demands client certificates of that authority.
	ClientCA string
}

// withDefaults returns c with defaults in place of zero values.
func (c Config) withDefaults() Config {
	if c.Protocol == "" {
		c.Protocol = HTTP
	}
	if c.Address == "" {
		c.Address = DefaultAddress
	}
	if c.HeaderTimeout == 0 {
		c.HeaderTimeout = DefaultHeaderTimeout
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = DefaultIdleTimeout
	}
	if c.MaxHeaderBytes == 0 {
		c.MaxHeaderBytes = DefaultMaxHeaderBytes
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = DefaultMaxConnections
	}
	return c
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("httpd: "+format, args...)) }
	switch c.Protocol {
	case HTTP:
	case H2C:
		if c.TLS != nil {
			bad("protocol h2c with tls: h2c is HTTP/2 without TLS; use protocol http, which has HTTP/2 under TLS by itself")
		}
	default:
		bad("protocol %q: use %q or %q", c.Protocol, HTTP, H2C)
	}
	if _, _, err := net.SplitHostPort(c.Address); err != nil {
		bad("address %q: write host:port, as in %q: %w", c.Address, DefaultAddress, err)
	}
	if c.NextFree < 0 || c.NextFree > maxNextFree {
		bad("next_free %d: must be between 0 and %d", c.NextFree, maxNextFree)
	}
	if c.HeaderTimeout < 0 || c.IdleTimeout < 0 {
		bad("header_timeout %v, idle_timeout %v: must not be negative", c.HeaderTimeout, c.IdleTimeout)
	}
	if c.MaxHeaderBytes < 1024 || c.MaxHeaderBytes > 16<<20 {
		bad("max_header_bytes %d: must be between 1 KiB and 16 MiB", c.MaxHeaderBytes)
	}
	if c.MaxConnections < 1 {
		bad("max_connections %d: must be at least 1", c.MaxConnections)
	}
	if c.TLS != nil && (c.TLS.Cert == "" || c.TLS.Key == "") {
		bad("tls needs both cert and key")
	}
	return errors.Join(errs...)
}

// load reads the files. It is done at the start, so that they may be renewed
// between two starts.
func (t *TLS) load() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("httpd: tls certificate %s with key %s: %w", t.Cert, t.Key, err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	if t.ClientCA == "" {
		return c, nil
	}
	pem, err := os.ReadFile(t.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("httpd: tls client_ca: %w", err)
	}
	c.ClientCAs = x509.NewCertPool()
	if !c.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("httpd: tls client_ca %s: it holds no certificate in PEM form", t.ClientCA)
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	return c, nil
}
