package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// pemFiles writes a certificate that is its own authority.
func pemFiles(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestTransports(t *testing.T) {
	cert, key := pemFiles(t)
	for _, c := range []struct {
		name, text string
		want       []string // parts of problems; none means no error
	}{
		{"TLS", "tls: {ca: CERT, certificate: CERT, key: KEY, names: [a.example]}", []string{"Apache Tomcat cannot take part"}},
		{"TLS without a file", "tls: {ca: CERT, key: KEY}", []string{"node.yaml:3:", "cluster.channel.tls.certificate", "is missing"}},
		{"TLS with a missing file", "tls: {ca: /nowhere, certificate: CERT, key: KEY}", []string{"/nowhere"}},
		{"TLS with the key for a certificate", "tls: {ca: CERT, certificate: KEY, key: CERT}", []string{"the certificate cannot be used"}},
		{"TLS and datagrams", "receiver: {udp_port: 4001}, tls: {ca: CERT, certificate: CERT, key: KEY}", []string{"datagrams are not protected"}},
		{"an unknown key", "tls: {cert: CERT}", []string{"cert"}},
		{"datagrams", "receiver: {udp_port: 4001, window_bytes: 1 MiB}, multicast: {bind: 127.0.0.1}", nil},
		{"a wrong group", "multicast: {address: 10.0.0.1, port: 70000, bind: lo, ttl: 300}", []string{"not an IPv4 multicast", "multicast.port", "multicast.bind", "multicast.ttl"}},
		{"a wrong window", "receiver: {udp_port: 70000, window_bytes: 1}", []string{"receiver.udp_port", "receiver.window_bytes"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := "cluster:\n  channel:\n    {" + strings.NewReplacer("CERT", cert, "KEY", key).Replace(c.text) + "}\n"
			cfg, err := Read("node.yaml", []byte(text))
			var said []string
			if err != nil {
				said = append(said, err.Error())
			} else {
				for _, p := range cfg.Validate() {
					if strings.HasPrefix(p.Path, "cluster.channel.receiver.address") {
						continue
					}
					if p.Severity == Error && c.want == nil {
						t.Errorf("%v", p)
					}
					said = append(said, p.Error())
				}
			}
			all := strings.Join(said, "\n")
			for _, w := range c.want {
				if !strings.Contains(all, w) {
					t.Errorf("nothing says %q:\n%s", w, all)
				}
			}
		})
	}
}
