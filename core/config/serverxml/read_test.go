package serverxml

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/core/config"
)

// tree writes files below a new directory.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const clustered = `<Server port="-1"><Service><Connector port="0" address="127.0.0.1"/>
<Engine name="Catalina" defaultHost="localhost" jvmRoute="a"><Cluster className="org.apache.catalina.ha.tcp.SimpleTcpCluster"/>
<Host name="localhost"><Context path="/x" docBase="x"/></Host><Host name="other" appBase="more"/></Engine></Service></Server>`

// Directories that exist are used: docBase with its web.xml, appBase for the
// deployer, further context files.
func TestDirectories(t *testing.T) {
	dir := tree(t, map[string]string{
		"conf/server.xml":           clustered,
		"webapps/x/index.html":      "x",
		"webapps/x/WEB-INF/web.xml": `<web-app><session-config><session-timeout>-1</session-timeout></session-config></web-app>`,
		"more/y.war":                "",
		"conf/Catalina/a#b.xml":     `<Context docBase="x" sessionCookieName="AB"/>`,
		"conf/Catalina/ROOT.xml":    `<Context distributable="true"/>`,
		"conf/web.xml":              `<web-app><distributable/></web-app>`,
	})
	conf := func(name string) string { return filepath.Join(dir, "conf", name) }
	cfg, err := Read(conf("server.xml"), []byte(clustered), Options{Contexts: []string{conf("Catalina/a#b.xml"), conf("web.xml"), conf("absent.xml")}})
	if err != nil {
		t.Fatal(err)
	}
	contexts := cfg.Engine.Hosts[0].Contexts
	if len(contexts) != 3 {
		t.Fatalf("%d contexts", len(contexts))
	}
	x, ab, root := contexts[0], contexts[1], contexts[2]
	if x.Dir != filepath.Join(dir, "webapps/x") || *x.Distributable || *x.Session.Timeout != 0 {
		t.Errorf("x: %+v", x)
	}
	if ab.Path != "/a/b" || ab.Session.Cookie != "AB" || ab.Dir == "" {
		t.Errorf("a#b: %+v", ab)
	}
	if root.Path != "" || !*root.Distributable {
		t.Errorf("root: %+v", root)
	}
	d := cfg.Cluster.Deployer
	if d == nil || d.Use != deployerName || d.Options()["dir"] != filepath.Join(dir, "webapps") {
		t.Errorf("deployer %+v", d)
	}
	text := describe(cfg.Warnings)
	for _, want := range []string{"web.xml:1: warning: the web.xml has no <distributable/>", "are deployed", "deploying from a second directory", "absent.xml: error"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "webapps/x/WEB-INF/web.xml"), []byte("<web-app"), 0o600); err != nil {
		t.Fatal(err)
	}
	if cfg, err = Read(conf("server.xml"), []byte(clustered), Options{}); err != nil || config.Worst(cfg.Warnings) != config.Error {
		t.Errorf("a broken web.xml passes: %v", err)
	}
}

func TestTLS(t *testing.T) {
	in := `<Connector port="8443" address="127.0.0.1" SSLEnabled="true">
	<SSLHostConfig certificateVerification="required" caCertificateFile="conf/ca.pem">
	<Certificate certificateFile="conf/c.pem" certificateKeyFile="/k.pem"/></SSLHostConfig></Connector>`
	cfg, err := Read("connector.xml", []byte(in), Options{Base: base})
	if err != nil {
		t.Fatal(err)
	}
	want := config.TLS{Cert: base + "/conf/c.pem", Key: "/k.pem", ClientCA: base + "/conf/ca.pem"}
	if len(cfg.Connectors) != 1 || cfg.Connectors[0].TLS == nil || *cfg.Connectors[0].TLS != want {
		t.Errorf("%+v\n%s", cfg.Connectors, describe(cfg.Warnings))
	}
}

// Every option number is read, and said in words.
func TestSendOptions(t *testing.T) {
	for in, want := range map[string]string{"0": "async", "1": "async", "2": "ack", "3": "ack", "4": "sync", "6": "sync", "8": "async", "10": "async", "14": "async",
		"asynchronous": "async", "async, use_ack": "async", "sync_ack,use_ack": "sync", "USE_ACK": "ack", "128": "async"} {
		cfg, err := Read("c.xml", fmt.Appendf(nil, `<Cluster className="x.SimpleTcpCluster" channelSendOptions="%s"/>`, in), Options{Base: base})
		if err != nil || cfg.Cluster.Send != want {
			t.Errorf("%s: %v, %v", in, cfg.Cluster.Send, err)
		}
		if !strings.Contains(describe(cfg.Warnings), "here send: "+want) {
			t.Errorf("%s: not said in words: %s", in, describe(cfg.Warnings))
		}
	}
	for _, in := range []string{"-1", "x", "8,2", "", "99999999999"} {
		cfg, err := Read("c.xml", fmt.Appendf(nil, `<Cluster className="x.SimpleTcpCluster" channelSendOptions="%s"/>`, in), Options{Base: base})
		if err != nil || config.Worst(cfg.Warnings) != config.Error {
			t.Errorf("%q was accepted", in)
		}
	}
}

func TestReplicationModes(t *testing.T) {
	for in, want := range map[string]string{`replicationMode="pooled"`: "ack", `replicationMode="pooled" waitForAck="false"`: "async",
		`replicationMode="synchronous"`: "sync", `replicationMode="asynchronous"`: "async", `replicationMode="fastasyncqueue"`: "async", "": "async"} {
		cfg, err := Read("c.xml", fmt.Appendf(nil, `<Cluster className="x.SimpleTcpCluster"><Sender %s/></Cluster>`, in), Options{Base: base})
		if err != nil || cfg.Cluster.Send != want {
			t.Errorf("%s: %v, %v", in, cfg.Cluster.Send, err)
		}
	}
}

func TestBounds(t *testing.T) {
	attrs := strings.Builder{}
	for i := range 300 {
		fmt.Fprintf(&attrs, ` a%d=""`, i)
	}
	for name, in := range map[string]string{
		"empty":      "",
		"text":       "hello",
		"size":       "<Server>" + strings.Repeat(" ", config.MaxFile) + "</Server>",
		"depth":      strings.Repeat("<Server>", 100) + strings.Repeat("</Server>", 100),
		"elements":   "<Server>" + strings.Repeat("<Service/>", 20_000) + "</Server>",
		"attributes": "<Server" + attrs.String() + "/>",
		"value":      `<Server port="` + strings.Repeat("x", 100_000) + `"/>`,
		"two roots":  "<Server/><Server/>",
		"encoding":   `<?xml version="1.0" encoding="GB2312"?><Server/>`,
	} {
		start := time.Now()
		if _, err := Read("f.xml", []byte(in), Options{Base: base}); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if d := time.Since(start); d > time.Minute { // not a second anywhere
			t.Errorf("%s: took %v", name, d)
		}
	}
	many := "<Engine>" + strings.Repeat(`<Oops a="1"/>`, 5000) + "</Engine>"
	cfg, err := Read("f.xml", []byte(many), Options{Base: base})
	if err != nil || len(cfg.Warnings) > maxProblems {
		t.Errorf("%d findings, %v", len(cfg.Warnings), err)
	}
}

func TestMulticastGroup(t *testing.T) {
	for in, want := range map[string]config.Severity{"228.0.0.4": config.Note, "ff02::1": config.Unavailable, "10.0.0.1": config.Error, "x": config.Error} {
		cfg, err := Read("c.xml", fmt.Appendf(nil, `<Cluster className="x.SimpleTcpCluster"><Channel><Membership address="%s"/></Channel></Cluster>`, in), Options{Base: base})
		if err != nil || config.Worst(cfg.Warnings) != want {
			t.Errorf("%s: %v, %v", in, err, describe(cfg.Warnings))
		}
	}
}

func TestContextPath(t *testing.T) {
	for in, want := range map[string]string{"ROOT.xml": "", "17-s002-ROOT.xml": "", "context.xml": "", "shop.xml": "/shop", "a#b.xml": "/a/b", "shop##2.xml": "/shop", "#..#x.xml": ""} {
		if got := contextPath("conf/Catalina/localhost/" + in); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}
