package config

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/longhouse-go/longhouse/channel/secret"
)

// same compares models without places.
var same = cmp.Options{
	cmpopts.IgnoreTypes(Pos{}),
	cmpopts.EquateEmpty(),
	cmp.Comparer(func(a, b Component) bool {
		return a.Use == b.Use && a.Mode == b.Mode && cmp.Equal(a.Options(), b.Options())
	}),
}

const full = `
node: {name: a, work_dir: /tmp, shutdown_timeout: 10s}
admin: {address: "off"}
log: {level: debug, format: json}
connectors:
  - address: :8080
    next_free: 5
    max_header_bytes: 32KiB
  - protocol: h2c
    address: "[::1]:8081"
    header_timeout: 1m30s
engine:
  name: Catalina
  default_host: localhost
  route: node1
  valves:
    - use: accesslog
      format: "%h \"%r\" %s # not a comment: really"
      empty: ""
      truth: "true"
      list: [a, 'b c', 3, 1.5, true, {deep: [x]}]
    - remoteip
  hosts:
    - name: localhost
      aliases: [www.example.com, "*.example.org"]
      valves: [replication]
      contexts:
        - path: ""
          app: demo
          distributable: false
          session: {timeout: 0s, cookie: SID, cookies: false, max_size: 2MiB}
        - path: /files
          dir: /tmp
          manager: {use: delta, mode: direct}
cluster:
  send: sync
  manager: {use: delta, transfer_timeout: 60s}
  deployer: {use: watch, dir: /tmp}
  channel:
    domain: "1"
    membership:
      use: multicast
      mode: process
      drop_time: 3s
    receiver: {port: 4001, max_frame: 10MiB, address: auto}
    sender: {retries: 0, window_bytes: 1MiB}
    interceptors: [throughput, {use: dispatch, queue_bytes: 64MiB}]
`

func mustRead(t *testing.T, in string) *Config {
	t.Helper()
	c, err := Read("f.yaml", []byte(in))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestMarshalReadsBack(t *testing.T) {
	normal := mustRead(t, full)
	normal.Normalize()
	for name, c := range map[string]*Config{"full": mustRead(t, full), "normalized": normal, "default": Default(),
		"empty": {}, "cluster of defaults": {Cluster: &Cluster{}}, "empty elements": {Connectors: []Connector{{}, {}}}} {
		out, err := Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Read("again", out)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		if d := cmp.Diff(c, again, same); d != "" {
			t.Errorf("%s: %s\n%s", name, d, out)
		}
	}
}

func TestMarshalHidesSecrets(t *testing.T) {
	c := &Config{Engine: Engine{Valves: []Component{NewComponent("x", map[string]any{
		"password": "hunter2", "encryption_key": 1234, "api_token": "${env:TOKEN}", "nested": map[string]any{"secret": "hunter3"}, "code": secret.New("hunter5"), "old_keys": []any{"hunter4", "${env:OLD}"}, "monkey": "ape"}, Pos{})}},
		Connectors: []Connector{{TLS: &TLS{Cert: "c.pem", Key: "k.pem"}}}}
	out, err := Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, hidden := range []string{"hunter", "1234"} {
		if strings.Contains(string(out), hidden) {
			t.Errorf("shows %s:\n%s", hidden, out)
		}
	}
	for _, shown := range []string{"${env:TOKEN}", "${env:OLD}", "ape", "k.pem", redacted} {
		if !strings.Contains(string(out), shown) {
			t.Errorf("lacks %s:\n%s", shown, out)
		}
	}
}

func TestNormalizeTwice(t *testing.T) {
	for _, in := range []string{"", "cluster: {}", full} {
		c := mustRead(t, in)
		c.Normalize()
		once := c.clone()
		c.Normalize()
		if d := cmp.Diff(once, c, same); d != "" {
			t.Error(d)
		}
	}
}

func TestDefaults(t *testing.T) {
	c := mustRead(t, "engine: {hosts: [{contexts: [{path: /shop, app: shop}]}]}\ncluster: {channel: {membership: {bind: 127.0.0.1}}}")
	c.Normalize()
	x := c.Engine.Hosts[0].Contexts[0]
	if c.Connectors[0].Address != "127.0.0.1:8080" || c.Engine.DefaultHost != "localhost" || !*x.Distributable ||
		x.Session.CookiePath != "/shop" || *x.Session.Timeout != 30*time.Minute {
		t.Errorf("got %+v", c)
	}
	if m := c.Cluster.Channel.Membership; m.Use != "multicast" || m.Options()["bind"] != "127.0.0.1" {
		t.Errorf("membership %+v", m.Options())
	}
	if got := elementNamesOf(c.Engine.Valves); !slices.Equal(got, []string{"routebinder", "replication"}) {
		t.Errorf("valves %v", got)
	}
	if got := elementNamesOf(c.Cluster.Channel.Interceptors); !slices.Equal(got, defaultInterceptors) {
		t.Errorf("interceptors %v", got)
	}
	// Only what is missing altogether is added.
	c = mustRead(t, "engine: {valves: [replication]}\ncluster: {channel: {interceptors: []}}")
	c.Normalize()
	if len(c.Engine.Valves) != 1 || len(c.Cluster.Channel.Interceptors) != 0 {
		t.Errorf("valves %v, interceptors %v", c.Engine.Valves, c.Cluster.Channel.Interceptors)
	}
	if c = mustRead(t, ""); c.Cluster != nil {
		t.Error("a cluster out of nothing")
	}
	if _, err := Read("f", []byte("cluster:\n")); err == nil {
		t.Error("a cluster without a value must be refused: it would silently be none")
	}
	if c = mustRead(t, "cluster: null"); c.Cluster != nil {
		t.Error("an explicit null is none")
	}
}

func elementNamesOf(list []Component) []string {
	var names []string
	for _, c := range list {
		names = append(names, c.Use)
	}
	return names
}

func TestDefaultIsSound(t *testing.T) {
	for _, p := range Default().Validate() {
		if p.Severity > Note {
			t.Error(p)
		}
	}
}

func TestSet(t *testing.T) {
	c := Default()
	sets := [][2]string{
		{"engine.route", "01"}, {"connectors[0].address", ":0"}, {"connectors[1].address", "[::1]:80"},
		{"cluster.channel.receiver.port", "4100"}, {"cluster.channel.membership.bind", "10.0.0.1"},
		{"cluster.channel.membership.port", "45565"}, {"cluster.send", "sync"}, {"node.shutdown_timeout", "5s"},
		{"cluster.channel.interceptors[dispatch].queue_bytes", "1MiB"}, {"cluster.channel.interceptors[0].deep.er[0]", "[::1]:80"},
		{"engine.hosts[localhost].aliases", "[a, b]"}, {"engine.hosts[0].contexts[0].session.max_size", "1MiB"},
		{"engine.hosts[0].contexts[0].distributable", "false"}, {"cluster.deployer.use", "watch"}, {"cluster.deployer.dir", "/x"},
		{"cluster.manager", "{use: delta, mode: direct}"}, {"engine.valves[2]", "accesslog"}, {"connectors[0].tls.cert", "a: b"},
	}
	for _, s := range sets {
		if err := c.Set(s[0], s[1]); err != nil {
			t.Fatalf("%v: %v", s, err)
		}
	}
	ch := c.Cluster.Channel
	got := []any{c.Engine.Route, c.Connectors[0].Address, c.Connectors[1].Address, ch.Receiver.Port, ch.Membership.Options(), c.Cluster.Send,
		c.Node.ShutdownTimeout, ch.Interceptors[1].Options(), ch.Interceptors[0].Options(), c.Engine.Hosts[0].Aliases,
		c.Engine.Hosts[0].Contexts[0].Session.MaxSize, *c.Engine.Hosts[0].Contexts[0].Distributable, c.Cluster.Deployer.Use,
		c.Cluster.Deployer.Options(), c.Cluster.Manager.Mode, c.Engine.Valves[2].Use, c.Connectors[0].TLS.Cert}
	want := []any{"01", ":0", "[::1]:80", 4100, map[string]any{"bind": "10.0.0.1", "port": int64(45565)}, "sync",
		5 * time.Second, map[string]any{"queue_bytes": "1MiB"}, map[string]any{"deep": map[string]any{"er": []any{"[::1]:80"}}},
		[]string{"a", "b"}, 1 << 20, false, "watch", map[string]any{"dir": "/x"}, "direct", "accesslog", "a: b"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if err := c.Set("cluster", "null"); err != nil || c.Cluster != nil {
		t.Errorf("cluster %v, %v", c.Cluster, err)
	}
	if err := c.Set("cluster.channel.interceptors[failuredetector].x", "1"); err != nil || len(c.Cluster.Channel.Interceptors) != 3 {
		t.Errorf("%v", err)
	}
}

// What the importer put into a context gives way to what is set.
func TestSetReplacesPlaceholder(t *testing.T) {
	c := &Config{Engine: Engine{Hosts: []Host{{Name: "a", Contexts: []Context{{App: "demo", Placeholder: true}}}}}}
	if err := c.Set("engine.hosts[a].contexts[0].dir", "/tmp"); err != nil {
		t.Fatal(err)
	}
	if x := c.Engine.Hosts[0].Contexts[0]; x.App != "" || x.Dir != "/tmp" || x.Placeholder {
		t.Errorf("%+v", x)
	}
}

// A wrong option from the command line says so.
func TestSetOrigin(t *testing.T) {
	c := Default()
	if err := c.Set("cluster.manager.size", "many"); err != nil {
		t.Fatal(err)
	}
	var o struct{ Size int }
	if err := c.Cluster.Manager.Decode(&o); err == nil || !strings.Contains(err.Error(), "--set cluster.manager.size: error: size: ") {
		t.Errorf("got %v", err)
	}
}

func TestSetErrors(t *testing.T) {
	for _, tt := range [][3]string{
		{"engine.rout", "x", `engine has no "rout"; it has name, default_host, route, valves, hosts; did you mean "route"?`},
		{"nonsense", "x", `the configuration has no "nonsense"; it has node,`},
		{"", "x", "the path is empty"},
		{"a..b", "x", "empty name"},
		{"connectors[", "x", "[ without ]"},
		{"connectors.address", "x", "connectors is a list: choose an element, connectors[0].address"},
		{"connectors[7].address", "x", "connectors[7] does not exist: the list has 1 elements"},
		{"engine.hosts[other].name", "x", `has no element "other"; it has localhost`},
		{"engine.route.x", "x", "engine.route is a single value"},
		{"cluster.channel.receiver.port", "many", `cluster.channel.receiver.port: must be a whole number, not "many"`},
		{"cluster.channel.receiver.port", "[1", `--set cluster.channel.receiver.port:`},
		{"cluster.manager.mode", "fast", "unknown mode"},
		{"cluster.channel.membership.bind.x", "1", "is a single value"},
		{"node.shutdown_timeout", "5", "a duration needs a unit"},
	} {
		c := Default()
		before := c.clone()
		err := c.Set(tt[0], tt[1])
		if err == nil || !strings.Contains(err.Error(), tt[2]) {
			t.Errorf("%s: got %v, want %s", tt[0], err, tt[2])
		}
		if d := cmp.Diff(before, c, same); d != "" {
			t.Errorf("%s: a failed Set changed the model: %s", tt[0], d)
		}
	}
}

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	open, private := write("open.key", "k", 0o644), write("private.key", "k", 0o600)
	tests := []struct{ in, want string }{
		{"connectors: [{address: ':8080'}, {address: '127.0.0.1:8080'}]", "error: connectors[1].address: port 8080 is also the port of connectors[0].address"},
		{"connectors: [{address: '127.0.0.1:9000'}]\nadmin: {address: 'localhost:9000'}", "error: admin.address: port 9000 is also the port of connectors[0].address"},
		{"connectors: [{address: '127.0.0.1:4000'}]\ncluster: {channel: {receiver: {auto_bind: 1}}}", "error: cluster.channel.receiver.port: port 4000 is also"},
		{"connectors: [{address: localhost}]", `"localhost" is not host:port`},
		{"connectors: [{address: ':70000'}]", `"70000" is not a port`},
		{"connectors: [{protocol: htp}]", `"htp" is none of http, h2c, ajp`},
		{"connectors: [{protocol: ajp}]", "not available: connectors[0].protocol: AJP connectors are not available in this version"},
		{"connectors: [{header_timeout: -1s}]", "connectors[0].header_timeout: -1s is out of range"},
		{"connectors: [{tls: {cert: a}}]", "cert and key are both needed"},
		{"connectors: [{tls: {cert: /nonexistent, key: /nonexistent}}]", "the certificate cannot be used: open /nonexistent"},
		{"connectors: [{tls: {cert: " + open + ", key: " + open + "}}]", "connectors[0].tls.key: everybody on this machine can read the secret"},
		{"admin: {address: ':8077'}", "warning: admin.address: the admin API listens beyond this machine"},
		{"log: {level: loud}", `log.level: "loud" is none of`},
		{"engine: {route: 'a b'}", `engine.route: "a b" has characters`},
		{"cluster: {}", "note: engine.route: no route is set"},
		{"engine: {default_host: x, hosts: [{name: a}]}", `engine.default_host: there is no host "x"`},
		{"engine: {hosts: [{name: a}, {name: A}]}", `engine.hosts[1]: the name "A" is also that of engine.hosts[0]`},
		{"engine: {hosts: [{name: a, aliases: [b, B]}]}", `engine.hosts[0].aliases[1]: the name "B" is also that of engine.hosts[0].aliases[0]`},
		{"engine: {hosts: [{name: a}, {aliases: [b]}]}", `engine.hosts[1]: "" is not a host name`},
		{"engine: {hosts: [{contexts: [{app: x, path: /}, {app: y}]}]}", `two contexts at ""`},
		{"engine: {hosts: [{contexts: [{app: x, path: shop}]}]}", `"shop" is not a context path`},
		{"engine: {hosts: [{contexts: [{app: x, path: /a/../b}]}]}", `"/a/../b" is not a context path`},
		{"engine: {hosts: [{contexts: [{app: x, path: /a//b}]}]}", `is not a context path`},
		{"engine: {hosts: [{contexts: [{path: /a}]}]}", "note: engine.hosts[0].contexts[0]: names neither an application nor a directory"},
		{"engine: {hosts: [{contexts: [{app: a, dir: b}]}]}", "has an application and a directory"},
		{"engine: {hosts: [{contexts: [{dir: /nonexistent/x}]}]}", "no such file or directory"},
		{"engine: {hosts: [{contexts: [{app: a, manager: delta}]}]}", "a manager needs a cluster"},
		{"engine: {hosts: [{contexts: [{app: a, distributable: true}]}]}", "warning: engine.hosts[0].contexts[0].distributable: the node has no cluster"},
		{"engine: {hosts: [{contexts: [{app: a, session: {cookie: 'a b'}}]}]}", `"a b" is not a cookie name`},
		{"engine: {hosts: [{contexts: [{app: a, session: {same_site: sometimes}}]}]}", `"sometimes" is none of lax`},
		{"engine: {hosts: [{contexts: [{app: a, session: {cookie_path: 'x;y'}}]}]}", `"x;y" is not a path`},
		{"engine: {hosts: [{contexts: [{app: a, session: {max_size: 100MiB}}]}]}\ncluster: {}", "100MiB is more than a message may have"},
		{"engine: {hosts: [{contexts: [{app: a, session: {listeners: 'sessions, loud'}}]}]}", `"sessions, loud" is not local, cluster or a list of sessions, ids, attributes`},
		{"engine: {hosts: [{contexts: [{app: a, send: soon}]}]}\ncluster: {}", `engine.hosts[0].contexts[0].send: "soon" is none of async, ack, sync`},
		{"engine: {hosts: [{contexts: [{app: a, send: sync}]}]}", "warning: engine.hosts[0].contexts[0].send: the node has no cluster"},
		{"cluster: {listeners: everything}", `cluster.listeners: "everything" is not local`},
		{"cluster: {send: maybe}", `cluster.send: "maybe" is none of async, ack, sync`},
		{"cluster: {}\nengine: {valves: [routebinder]}", "there is no replication valve"},
		{"cluster: {}\nengine: {route: a, valves: [replication]}", "there is no routebinder valve"},
		{"cluster: {channel: {receiver: {address: here}}}", `"here" is neither an IP address nor auto`},
		{"cluster: {channel: {receiver: {address: 0.0.0.0}}}", "0.0.0.0 cannot be announced"},
		{"cluster: {}", "note: cluster.channel.receiver.address: the receiver is on 127.0.0.1"},
		{"cluster: {channel: {receiver: {port: 70000}}}", "receiver.port: 70000 is out of range, 0 to 65535"},
		{"cluster: {channel: {receiver: {max_frame: 1KiB}}}", "receiver.max_frame: 1024 is out of range"},
		{"cluster: {channel: {sender: {retries: -1}}}", "sender.retries: -1 is out of range"},
		{"cluster: {deployer: {dir: x}}", "cluster.deployer: says not which component"},
		{"cluster: {manager: {use: x, key: '${env:LONGHOUSE_TEST_UNSET}'}}", "cluster.manager.key: the environment variable LONGHOUSE_TEST_UNSET is not set"},
		{"cluster: {manager: {use: x, key: '${file:" + open + "}'}}", "cluster.manager.key: everybody on this machine can read the secret"},
	}
	for _, tt := range tests {
		c := mustRead(t, tt.in)
		before := c.clone()
		ps := c.Validate()
		if !slices.ContainsFunc(ps, func(p Problem) bool { return strings.Contains(p.Error(), tt.want) }) {
			t.Errorf("%s\n got %v\nwant %s", tt.in, Problems(ps), tt.want)
		}
		if d := cmp.Diff(before, c, same); d != "" {
			t.Errorf("%s: Validate changed the model: %s", tt.in, d)
		}
	}
	fine := mustRead(t, "cluster: {manager: {use: x, key: '${file:"+private+"}'}}")
	if ps := fine.Validate(); Worst(ps) > Note {
		t.Error(Problems(ps))
	}
	literal := "cluster: {manager: {use: x, password: hunter2}}"
	for mode, worst := range map[os.FileMode]Severity{0o644: Warning, 0o600: Note} {
		file := write("c.yaml", literal, mode)
		c, err := Load(file)
		if err != nil {
			t.Fatal(err)
		}
		if ps := c.Validate(); Worst(ps) != worst || strings.Contains(Problems(ps).Error(), "hunter2") {
			t.Errorf("%o: %v", mode, Problems(ps))
		}
	}
}

func TestLoadErrors(t *testing.T) {
	big := filepath.Join(t.TempDir(), "big.yaml")
	if err := os.WriteFile(big, make([]byte, MaxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"/nonexistent/x.yaml", big, t.TempDir()} {
		if _, err := Load(file); err == nil {
			t.Errorf("%s was loaded", file)
		}
	}
}

// The schema names every key of the model and nothing else.
func TestSchema(t *testing.T) {
	var s map[string]any
	if err := json.Unmarshal(Schema(), &s); err != nil {
		t.Fatal(err)
	}
	at := func(path ...string) map[string]any {
		m := s
		for _, p := range path {
			next, ok := m[p].(map[string]any)
			if !ok {
				t.Fatalf("no %v", path)
			}
			m = next
		}
		return m
	}
	port := at("properties", "cluster", "properties", "channel", "properties", "receiver", "properties", "port")
	if port["type"] != "integer" || port["description"] != "Port is the first port to try. Default 4000." {
		t.Errorf("port: %v", port)
	}
	if got := at("properties", "connectors", "items")["additionalProperties"]; got != false {
		t.Errorf("additionalProperties: %v", got)
	}
	if got := at("properties", "engine", "properties", "valves", "items")["oneOf"]; got == nil {
		t.Error("valves are not components")
	}
	if len(at("properties")) != 6 {
		t.Errorf("keys: %v", at("properties"))
	}
}

// The example of the README is a configuration without errors.
func TestReadmeExample(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```yaml\n")
	example, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("the README has no example")
	}
	if ps := mustRead(t, example).Validate(); Worst(ps) > Note {
		t.Error(Problems(ps))
	}
}
