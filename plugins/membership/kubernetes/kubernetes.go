// Package kubernetes is the membership that finds other nodes by watching the
// pods, or the EndpointSlices of a service, through the API of Kubernetes. The
// nodes send their heartbeats to the addresses of the pods.
//
// The API is spoken with net/http and encoding/json: one list and one watch.
//
// It imports channel and the discovery that it shares with the memberships next
// to it, and must not import core, interceptors, valves, fx, go-plugin or grpc.
package kubernetes

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/discovery"
	"go.uber.org/zap"
)

// Name is the name of the membership in configuration.
const Name = "kubernetes"

// Config is what a user says about the membership. Empty fields are taken from
// the environment, from the variables that Tomcat's CloudMembershipService reads,
// or else from what Kubernetes gives to every pod.
type Config struct {
	// Namespace is where the pods are. Environment:
	// OPENSHIFT_KUBE_PING_NAMESPACE, KUBERNETES_NAMESPACE; then the namespace
	// of this pod; then tomcat.
	Namespace string `yaml:"namespace"`
	// Labels select the pods, as kubectl -l does: "app=shop,tier!=test". Empty
	// means all pods of the namespace. Environment:
	// OPENSHIFT_KUBE_PING_LABELS, KUBERNETES_LABELS.
	Labels string `yaml:"labels"`
	// Service watches the EndpointSlices of a service in place of pods.
	Service string `yaml:"service"`
	// Server is the URL of the API, https://host:port. Environment: …_HOST,
	// …_PORT and …_PROTOCOL of KUBERNETES_SERVICE, KUBERNETES_MASTER and
	// OPENSHIFT_KUBE_PING_MASTER.
	Server string `yaml:"server"`
	// TokenFile holds the bearer token; it is read again when it changes.
	// Environment: OPENSHIFT_KUBE_PING_SA_TOKEN_FILE, SA_TOKEN_FILE; then that
	// of the service account.
	TokenFile string `yaml:"token_file"`
	// CAFile holds the certificates that the API's must be signed by. It must
	// be there: nothing is trusted without it. Environment:
	// OPENSHIFT_KUBE_PING_CA_CERT_FILE, KUBERNETES_CA_CERTIFICATE_FILE; then
	// that of the service account.
	CAFile string `yaml:"ca_file"`
	// CertFile and KeyFile are a client certificate, in place of a token.
	// Environment: OPENSHIFT_KUBE_PING_CLIENT_CERT_FILE,
	// KUBERNETES_CLIENT_CERTIFICATE_FILE; KUBERNETES_CLIENT_KEY_FILE.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// ConnectTimeout bounds connecting, ReadTimeout the wait for an answer to
	// begin.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	ReadTimeout    time.Duration `yaml:"read_timeout"`
	// WatchTime is how long one watch lasts before it is made anew.
	WatchTime time.Duration `yaml:"watch_time"`

	discovery.Options `yaml:",inline"`
}

// What Kubernetes gives to every pod.
const account = "/var/run/secrets/kubernetes.io/serviceaccount/"

// Default returns the defaults.
func Default() Config {
	return Config{
		ConnectTimeout: time.Second,
		ReadTimeout:    5 * time.Second,
		WatchTime:      5 * time.Minute,
		Options:        discovery.DefaultOptions(),
	}
}

// The variables of the environment; the first that is set wins.
var (
	envNamespace = []string{"OPENSHIFT_KUBE_PING_NAMESPACE", "KUBERNETES_NAMESPACE"}
	envProtocol  = []string{"OPENSHIFT_KUBE_PING_MASTER_PROTOCOL", "KUBERNETES_MASTER_PROTOCOL"}
	envHost      = []string{"OPENSHIFT_KUBE_PING_MASTER_HOST", "KUBERNETES_SERVICE_HOST"}
	envPort      = []string{"OPENSHIFT_KUBE_PING_MASTER_PORT", "KUBERNETES_SERVICE_PORT"}
	envVersion   = []string{"OPENSHIFT_KUBE_PING_API_VERSION", "KUBERNETES_API_VERSION"}
	envLabels    = []string{"OPENSHIFT_KUBE_PING_LABELS", "KUBERNETES_LABELS"}
	envCert      = []string{"OPENSHIFT_KUBE_PING_CLIENT_CERT_FILE", "KUBERNETES_CLIENT_CERTIFICATE_FILE"}
	envKey       = []string{"KUBERNETES_CLIENT_KEY_FILE"}
	envCA        = []string{"OPENSHIFT_KUBE_PING_CA_CERT_FILE", "KUBERNETES_CA_CERTIFICATE_FILE"}
	envToken     = []string{"OPENSHIFT_KUBE_PING_SA_TOKEN_FILE", "SA_TOKEN_FILE"}
)

// Environment names the variables that are read. None of them holds a secret.
func Environment() (all []string) {
	for _, names := range [][]string{envNamespace, envProtocol, envHost, envPort, envVersion, envLabels, envCert, envKey, envCA, envToken} {
		all = append(all, names...)
	}
	return all
}

// Validate reports all problems at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, f := range []struct{ key, value string }{{"namespace", c.Namespace}, {"service", c.Service}} {
		if err := checkWord(f.value); f.value != "" && err != nil {
			fail("%s: %w", f.key, err)
		}
	}
	if c.Service != "" && c.Labels != "" {
		fail("labels: a service has its own; remove one of service and labels")
	}
	if len(c.Labels) > 4096 || strings.ContainsAny(c.Labels, "\r\n") {
		fail("labels: a selector is one line of at most 4096 characters")
	}
	if c.Server != "" {
		if _, err := parseServer(c.Server); err != nil {
			fail("server: %w", err)
		}
	}
	if c.KeyFile != "" && c.CertFile == "" {
		fail("key_file: a key without cert_file is of no use")
	}
	for _, d := range []struct {
		key      string
		value    time.Duration
		min, max time.Duration
	}{
		{"connect_timeout", c.ConnectTimeout, 10 * time.Millisecond, time.Minute},
		{"read_timeout", c.ReadTimeout, 10 * time.Millisecond, time.Minute},
		{"watch_time", c.WatchTime, 5 * time.Second, time.Hour},
	} {
		if d.value < d.min || d.value > d.max {
			fail("%s: %v is outside %v..%v", d.key, d.value, d.min, d.max)
		}
	}
	errs = append(errs, c.Options.Validate())
	return errors.Join(errs...)
}

// checkWord refuses what is no name of an object in Kubernetes.
func checkWord(s string) error {
	if len(s) > 253 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" || strings.Trim(s, "-.") != s || s == "" {
		return fmt.Errorf("%q is no name in Kubernetes: small letters, digits, dots and hyphens", s)
	}
	return nil
}

func parseServer(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("it is no URL") // the error repeats it, a password included
	case u.User != nil:
		return nil, errors.New("no user and password in the URL; use token_file or cert_file")
	case u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("%q is not like https://host:port", s)
	}
	return u, nil
}

// target is all that is needed to ask.
type target struct {
	base      *url.URL
	namespace string
	tokenFile string // empty for none
	caFile    string
	certFile  string
	keyFile   string
	labels    string
}

// resolve fills in what c leaves open. env and exists are those of package os.
func (c Config) resolve(env func(string) string, read func(string) ([]byte, error)) (t target, err error) {
	first := func(names []string) string {
		for _, n := range names {
			if v := env(n); v != "" {
				return v
			}
		}
		return ""
	}
	exists := func(file string) string {
		if _, err := read(file); err != nil {
			return ""
		}
		return file
	}
	if v := cmp.Or(first(envVersion), "v1"); v != "v1" {
		return t, fmt.Errorf("the version %q of the API is not known, only v1; unset %s", v, strings.Join(envVersion, ", "))
	}
	t.namespace = cmp.Or(c.Namespace, first(envNamespace))
	if t.namespace == "" {
		if b, err := read(account + "namespace"); err == nil {
			t.namespace = strings.TrimSpace(string(b))
		}
	}
	t.namespace = cmp.Or(t.namespace, "tomcat")
	if err := checkWord(t.namespace); err != nil {
		return t, fmt.Errorf("namespace: %w", err)
	}
	if c.Service == "" {
		t.labels = cmp.Or(c.Labels, first(envLabels))
	}
	server := c.Server
	if server == "" {
		host, port := first(envHost), first(envPort)
		if host == "" || port == "" {
			return t, fmt.Errorf("where the API of Kubernetes is nobody says: set server, or %s and %s (which every pod has)", envHost[1], envPort[1])
		}
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return t, fmt.Errorf("the port %q of the API, from the environment, is no number", port)
		}
		server = cmp.Or(first(envProtocol), "https") + "://" + net.JoinHostPort(strings.Trim(host, "[]"), port)
	}
	if t.base, err = parseServer(server); err != nil {
		return t, fmt.Errorf("server: %w", err)
	}
	t.certFile, t.keyFile = cmp.Or(c.CertFile, first(envCert)), cmp.Or(c.KeyFile, first(envKey))
	t.tokenFile = cmp.Or(c.TokenFile, first(envToken))
	if t.tokenFile == "" && t.certFile == "" {
		t.tokenFile = exists(account + "token")
	}
	if t.base.Scheme == "http" {
		t.certFile, t.keyFile = "", ""
		return t, nil // a proxy beside this process, as kubectl proxy
	}
	if t.certFile != "" && t.keyFile == "" {
		return t, fmt.Errorf("a client certificate without its key: set key_file, or %s", envKey[0])
	}
	t.caFile = cmp.Or(c.CAFile, first(envCA), exists(account+"ca.crt"))
	if t.caFile == "" {
		return t, fmt.Errorf("no certificates to trust: set ca_file, or %s; without one anybody could answer in place of the API", envCA[1])
	}
	return t, nil
}

// New returns a membership that has not started.
func New(c Config, s channel.Settings) (channel.Membership, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	t, err := c.resolve(os.Getenv, os.ReadFile)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	m, err := discovery.New(c.Options, newProvider(c, t, s), s)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return m, nil
}

func newProvider(c Config, t target, s channel.Settings) *provider {
	p := &provider{
		cfg: c, log: s.Logger, client: &client{target: t, cfg: c, net: s.Net},
		relists: s.Metrics.Counter("kubernetes_lists_total", "Full lists that were asked for."),
		watches: s.Metrics.Counter("kubernetes_watches_total", "Watches that were begun."),
		refused: s.Metrics.Counter("kubernetes_objects_refused_total", "Objects of the API that could not be used."),
	}
	if p.log == nil {
		p.log = zap.NewNop()
	}
	return p
}

// Factory makes memberships from configuration.
var Factory = channel.FactoryOf(Name, Default(), New)
