package cmd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// clusterFiles writes a certificate that is its own authority, for all nodes.
func clusterFiles(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		DNSNames: []string{"node.example"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
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

// metrics returns the node's metrics in Prometheus' format.
func (n *node) metrics() string {
	n.t.Helper()
	resp, err := http.Get("http://" + n.Admin + "/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

// Whole nodes with TLS between them: they find each other, the failure detector
// reaches them, a member is gone after its death; and one without TLS is not
// taken for a member that can be reached.
func TestClusterTLS(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	cert, key := clusterFiles(t)
	secured := []string{
		"--set", "cluster.channel.tls.ca=" + cert, "--set", "cluster.channel.tls.certificate=" + cert, "--set", "cluster.channel.tls.key=" + key,
		"--set", "cluster.channel.tls.names=[node.example]", "--set", "cluster.channel.receiver.udp_port=20000", "--set", "cluster.channel.receiver.auto_bind=20000",
	}
	g := newGroup(t)
	a, b := g.start("a", secured...), g.start("b", secured...)
	awaitMembers(2, a, b)
	a.awaitReady()
	b.awaitReady()
	const none = `channel_tls_refused_total{reason="plain"} 0`
	if !strings.Contains(a.metrics(), none) {
		t.Fatal("a counter is missing, or a member was refused")
	}
	plain := g.start("c")
	eventually(t, time.Minute, "the plain node is refused", func() bool { return !strings.Contains(a.metrics(), none) })
	plain.kill()
	b.kill()
	eventually(t, time.Minute, "the dead node is gone", func() bool {
		var members []struct{ Local bool }
		a.admin("/v1/members", &members)
		return !slices.ContainsFunc(members, func(m struct{ Local bool }) bool { return !m.Local })
	})
	if log := strings.ToLower(a.log.String()); strings.Contains(log, "panic") || strings.Contains(log, "begin private key") {
		t.Error("the log shows a panic or a secret")
	}
}
