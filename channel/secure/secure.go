// Package secure puts mutual TLS under everything of a node that goes over TCP:
// a [Net] wraps a transport.Net, so that senders, receivers and checks of
// members that are given it speak TLS 1.3 without knowing.
//
// Both sides show a certificate of the group's own authority. Host names are not
// checked, since members are found by address: who holds a certificate of the
// authority belongs to the group; [Config.Names] narrows that down. Peers of
// Apache Tribes cannot take part: Tribes has no TLS.
//
// Datagrams are left as they are: membership and messages with the options UDP
// and Multicast are not protected by this package.
//
// It imports package channel, zap and the root package of pion/transport.
package secure

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pion/transport/v2"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
)

// Config names the files of a node's identity, all in PEM form. They are read
// again when they have changed, at the next connection; connections that stand
// are not touched.
type Config struct {
	// CA holds the certificates of the authorities whose members are let in.
	CA string `yaml:"ca"`
	// Certificate and Key are this node's own; the certificate must be good
	// for servers and for clients. Intermediate certificates may follow it.
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
	// Names, if there are any, are the only ones a peer's certificate may
	// have: one of its DNS names, its URIs or its common name must be listed.
	Names []string `yaml:"names"`
}

// Validate implements channel.Validator. It reads the files.
func (c *Config) Validate() error {
	_, err := c.load()
	return err
}

// identity is what the files held at one time.
type identity struct {
	server, client *tls.Config
	stamps         [3]stamp
}

// stamp tells one content of a file from the next.
type stamp struct {
	changed time.Time
	size    int64
}

func (c *Config) files() [3]string { return [3]string{c.CA, c.Certificate, c.Key} }

func (c *Config) stamps() (out [3]stamp, err error) {
	for i, name := range c.files() {
		info, err := os.Stat(name)
		if err != nil {
			return out, fmt.Errorf("secure: %w", err)
		}
		out[i] = stamp{info.ModTime(), info.Size()}
	}
	return out, nil
}

// load reads the files.
func (c *Config) load() (*identity, error) {
	var errs []error
	for i, name := range c.files() {
		if name == "" {
			errs = append(errs, fmt.Errorf("secure: %s is missing: name the PEM file", [3]string{"ca", "certificate", "key"}[i]))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	stamps, err := c.stamps() // first: what changes while we read is read again
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, fmt.Errorf("secure: ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("secure: ca: %s holds no certificate in PEM form", c.CA)
	}
	own, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
	if err != nil {
		return nil, fmt.Errorf("secure: certificate %s with key %s: %w", c.Certificate, c.Key, err)
	}
	base := tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{own},
		SessionTicketsDisabled: true, // every connection shows its certificate
	}
	server, client := base.Clone(), base.Clone()
	server.ClientAuth, server.ClientCAs = tls.RequireAndVerifyClientCert, roots
	server.VerifyConnection = func(s tls.ConnectionState) error { return c.named(s.PeerCertificates[0]) }
	// The chain is verified below: what Go would do is bound to a host name.
	client.InsecureSkipVerify = true
	client.VerifyConnection = func(s tls.ConnectionState) error {
		o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), CurrentTime: time.Now()}
		for _, cert := range s.PeerCertificates[1:] {
			o.Intermediates.AddCert(cert)
		}
		if _, err := s.PeerCertificates[0].Verify(o); err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: s.PeerCertificates, Err: err}
		}
		return c.named(s.PeerCertificates[0])
	}
	return &identity{server: server, client: client, stamps: stamps}, nil
}

// errName says that a certificate is good and its owner unwanted.
var errName = errors.New("secure: the certificate has none of the names that are let in")

func (c *Config) named(cert *x509.Certificate) error {
	if len(c.Names) == 0 || slices.Contains(c.Names, cert.Subject.CommonName) {
		return nil
	}
	for _, name := range cert.DNSNames {
		if slices.Contains(c.Names, name) {
			return nil
		}
	}
	for _, u := range cert.URIs {
		if slices.Contains(c.Names, u.String()) {
			return nil
		}
	}
	return fmt.Errorf("%w: %q, %q", errName, cert.Subject.CommonName, cert.DNSNames)
}

// Why a connection did not come to be; values of the label reason.
const (
	refusedPlain       = "plain"       // the peer does not speak TLS
	refusedCertificate = "certificate" // of another authority, expired, or none
	refusedName        = "name"
	refusedClosed      = "closed" // the peer closed, or stopped answering
	refusedHandshake   = "handshake"
)

var reasons = []string{refusedPlain, refusedCertificate, refusedName, refusedClosed, refusedHandshake}

// Net is a network whose TCP connections are protected by mutual TLS.
type Net struct {
	transport.Net
	cfg Config
	log *zap.Logger

	now     atomic.Pointer[identity]
	loading atomic.Bool
	lastLog atomic.Int64

	accepted, dialed       map[string]*channel.Counter
	reloads, reloadsFailed *channel.Counter
}

// New returns the network s.Net under TLS. It reads the files.
func New(c Config, s channel.Settings) (*Net, error) {
	id, err := c.load()
	if err != nil {
		return nil, err
	}
	if s.Logger == nil {
		s.Logger = zap.NewNop()
	}
	n := &Net{Net: s.Net, cfg: c, log: s.Logger, accepted: map[string]*channel.Counter{}, dialed: map[string]*channel.Counter{}}
	n.now.Store(id)
	for _, r := range reasons {
		n.accepted[r] = s.Metrics.Counter("channel_tls_refused_total", "Connections of peers that were refused, by reason.", "reason", r)
		n.dialed[r] = s.Metrics.Counter("channel_tls_connect_failures_total", "Connections to peers that did not come to be because of TLS, by reason.", "reason", r)
	}
	n.reloads = s.Metrics.Counter("channel_tls_reloads_total", "Times that changed certificates were taken over.")
	n.reloadsFailed = s.Metrics.Counter("channel_tls_reload_failures_total", "Times that changed certificates could not be used; the earlier ones stay.")
	return n, nil
}

// Secured implements channel.SecuredNet.
func (n *Net) Secured() bool { return true }

// identity returns what the files hold now. If they cannot be used, it is what
// they held before.
func (n *Net) identity() *identity {
	old := n.now.Load()
	stamps, err := n.cfg.stamps()
	if err == nil && stamps == old.stamps || !n.loading.CompareAndSwap(false, true) {
		return old
	}
	defer n.loading.Store(false)
	id, err := n.cfg.load()
	if err != nil {
		n.reloadsFailed.Inc()
		if n.mayLog() {
			n.log.Warn("changed certificates cannot be used; the earlier ones stay", zap.Error(err))
		}
		return old
	}
	n.now.Store(id)
	n.reloads.Inc()
	n.log.Info("changed certificates taken over")
	return id
}

// logEvery is the least time between two log entries about refused peers.
const logEvery = 10 * time.Second

func (n *Net) mayLog() bool {
	now, last := time.Now().UnixNano(), n.lastLog.Load()
	return (last == 0 || now-last >= int64(logEvery)) && n.lastLog.CompareAndSwap(last, now)
}

// reason classifies the error of a handshake.
func reason(err error) string {
	var record tls.RecordHeaderError
	var cert *tls.CertificateVerificationError
	var alert tls.AlertError
	switch {
	case errors.As(err, &record):
		return refusedPlain
	case errors.Is(err, errName):
		return refusedName
	case errors.As(err, &cert):
		return refusedCertificate
	case errors.As(err, &alert):
		return refusedHandshake
	case channel.IsTimeout(err), channel.IsClosed(err), isEnd(err):
		return refusedClosed
	case err.Error() == "tls: client didn't provide a certificate":
		return refusedCertificate
	}
	return refusedHandshake
}
