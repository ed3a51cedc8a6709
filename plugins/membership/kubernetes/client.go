package kubernetes

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/pion/transport/v2"
)

const (
	// maxList bounds one page of a list, maxEvent one event of a watch, in
	// bytes; pageSize is how many objects a page has.
	maxList, maxEvent = 64 << 20, 4 << 20
	pageSize          = 500
	// maxFile bounds tokens and certificates, maxReason what is shown of an
	// error's body, in bytes.
	maxFile, maxReason = 1 << 20, 300
)

// apiError is an answer with a status that is no success.
type apiError struct {
	code   int
	reason string
}

func (e *apiError) Error() string {
	s := fmt.Sprintf("the API answers %d", e.code)
	if e.reason != "" {
		s += ": " + e.reason
	}
	switch e.code {
	case http.StatusUnauthorized:
		s += " (is the token, or the client certificate, that of an account of this cluster?)"
	case http.StatusForbidden:
		s += " (the account needs a role with the verbs list and watch)"
	}
	return s
}

// gone reports whether err says that the list must be asked for anew.
func gone(err error) bool {
	var e *apiError
	return errors.As(err, &e) && e.code == http.StatusGone
}

// client asks the API. It is used by one goroutine.
type client struct {
	target target
	cfg    Config
	net    transport.Net

	http  *http.Client
	files map[string]stamp // of the certificates that http uses
	token string
	from  stamp // the token's file
}

// stamp tells one version of a file from another.
type stamp struct {
	changed time.Time
	size    int64
}

func stampOf(file string) (stamp, error) {
	info, err := os.Stat(file)
	if err != nil {
		return stamp{}, err
	}
	return stamp{info.ModTime(), info.Size()}, nil
}

// prepare reads the token and the certificates again, if they have changed.
func (c *client) prepare() error {
	if f := c.target.tokenFile; f != "" {
		now, err := stampOf(f)
		if err != nil {
			return fmt.Errorf("the token: %w", err)
		}
		if c.token == "" || now != c.from {
			b, err := readFile(f)
			if err != nil {
				return fmt.Errorf("the token: %w", err)
			}
			token := strings.TrimSpace(string(b))
			if token == "" || strings.ContainsAny(token, " \t\r\n") {
				return fmt.Errorf("the token's file %s holds no token", f)
			}
			c.token, c.from = token, now
		}
	}
	files := map[string]stamp{}
	for _, f := range []string{c.target.caFile, c.target.certFile, c.target.keyFile} {
		if f == "" {
			continue
		}
		now, err := stampOf(f)
		if err != nil {
			return fmt.Errorf("the certificates: %w", err)
		}
		files[f] = now
	}
	if c.http != nil && sameFiles(files, c.files) {
		return nil
	}
	conf, err := c.tls()
	if err != nil {
		return err
	}
	c.close()
	c.files = files
	c.http = &http.Client{
		Transport: &http.Transport{
			Proxy:                 nil, // the environment's proxy is not for the API
			DialContext:           c.dial,
			TLSClientConfig:       conf,
			TLSHandshakeTimeout:   c.cfg.ConnectTimeout,
			ResponseHeaderTimeout: c.cfg.ReadTimeout,
			MaxIdleConnsPerHost:   1,
			IdleConnTimeout:       time.Minute,
			DisableCompression:    true, // so that the bounds are those of what is read
			TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("the API redirects; that is not followed, because the token would go with it")
		},
	}
	return nil
}

func sameFiles(a, b map[string]stamp) bool {
	for f, s := range a {
		if b[f] != s {
			return false
		}
	}
	return len(a) == len(b)
}

func readFile(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", file, maxFile)
	}
	return b, err
}

func (c *client) tls() (*tls.Config, error) {
	if c.target.base.Scheme == "http" {
		return nil, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	pem, err := readFile(c.target.caFile)
	if err != nil {
		return nil, fmt.Errorf("the certificates to trust: %w", err)
	}
	if !conf.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("the file %s holds no certificate to trust", c.target.caFile)
	}
	if c.target.certFile == "" {
		return conf, nil
	}
	cert, err := readFile(c.target.certFile)
	if err != nil {
		return nil, fmt.Errorf("the client certificate: %w", err)
	}
	key, err := readFile(c.target.keyFile)
	if err != nil {
		return nil, fmt.Errorf("the client certificate's key: %w", err)
	}
	if bytes.Contains(key, []byte("ENCRYPTED")) {
		return nil, fmt.Errorf("the key %s is encrypted, which is not supported: write it without (openssl pkey -in %[1]s -out …), readable for this user alone", c.target.keyFile)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("the client certificate %s and its key: %w", c.target.certFile, err)
	}
	conf.Certificates = []tls.Certificate{pair}
	return conf, nil
}

// dial connects by the node's net.
func (c *client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := c.net.CreateDialer(&net.Dialer{Timeout: c.cfg.ConnectTimeout})
	if cd, ok := d.(channel.ContextDialer); ok {
		return cd.DialContext(ctx, network, address)
	}
	return d.Dial(network, address)
}

func (c *client) close() {
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
}

// get asks for a path below the server's. The caller closes the body.
func (c *client) get(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	if err := c.prepare(); err != nil {
		return nil, err
	}
	u := c.target.base.JoinPath(path)
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "longhouse")
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var s status
	_ = json.Unmarshal(b, &s) // an error page of somebody in between is none
	return nil, &apiError{resp.StatusCode, short(s.Message)}
}

// short makes foreign text fit for a log line.
func short(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "…"
	}
	return s
}
