package serverxml

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/longhouse-go/longhouse/core/config"
)

// Options say where a file belongs.
type Options struct {
	// Base is the instance's directory (CATALINA_BASE), against which relative
	// names are resolved. If it is empty, it is the parent of a directory named
	// conf in which the file lies, else the file's own directory.
	Base string
	// Contexts are further files to be read with a server.xml: context.xml and
	// context descriptors (ROOT.xml is the root, a#b.xml is /a/b), and web.xml
	// (for the root).
	Contexts []string
}

// Read reads a Tomcat file: a whole server.xml, or one of the elements Service,
// Engine, Host, Context, Cluster, Connector and web-app alone. What is written in
// another letter case or under an older name is understood. The findings are the
// Warnings of the model, in the order of the file; what is not available in this
// version is a finding of that severity and left out of the model. The error is
// config.Problems and means that nothing could be read.
//
// Beside the file itself Read looks whether the directories that it names exist,
// and reads WEB-INF/web.xml of contexts.
func Read(file string, data []byte, o Options) (*config.Config, error) {
	root, err := parse(file, data)
	if err != nil {
		return nil, err
	}
	r := &reader{base: baseDir(file, o.Base), cfg: new(config.Config)}
	if !r.root(root, file) {
		return nil, config.Problems{{Pos: root.pos, Severity: config.Error,
			What: fmt.Sprintf("<%s> is not an element of Tomcat's configuration that is read alone", cut(root.name)),
			Fix:  "give a server.xml, context.xml or web.xml, or one of the elements Service, Engine, Host, Context, Cluster, Connector"}}
	}
	for _, extra := range o.Contexts {
		r.extra(extra)
	}
	r.finish()
	sortByPlace(r.problems)
	r.cfg.Warnings = r.problems
	return r.cfg, nil
}

func baseDir(file, base string) string {
	if base != "" {
		return base
	}
	dir := filepath.Dir(file)
	if filepath.Base(dir) == "conf" {
		return filepath.Dir(dir)
	}
	return dir
}

// sortByPlace orders findings by file and line, those of one line as found.
func sortByPlace(ps []config.Problem) {
	slices.SortStableFunc(ps, func(a, b config.Problem) int {
		if c := strings.Compare(a.Pos.File, b.Pos.File); c != 0 {
			return c
		}
		return a.Pos.Line - b.Pos.Line
	})
}

// maxProblems bounds the findings: a hostile file could cause one per attribute.
const maxProblems = 500

// reader turns elements into the model.
type reader struct {
	base     string
	cfg      *config.Config
	problems []config.Problem

	// cluster is where the cluster is written, nil for nowhere. clusterHost is
	// the host that it is written in, "" for the engine.
	cluster     *element
	clusterHost string
	// clusterValves are the cluster's valves, nil if none is written.
	clusterValves []config.Component
	portOffset    int
	watched       []watched
	receiverSeen  bool
	// stores is where the first manager of a context is written that keeps
	// sessions in a store; waits says that requests wait for it.
	stores config.Pos
	waits  bool
}

func (r *reader) add(p config.Problem) {
	if len(r.problems) < maxProblems {
		r.problems = append(r.problems, p)
	}
}

func (r *reader) fail(pos config.Pos, what, fix string) {
	r.add(config.Problem{Pos: pos, Severity: config.Error, What: what, Fix: fix})
}

func (r *reader) unavailable(pos config.Pos, what, why, fix string) {
	r.add(config.Problem{Pos: pos, Severity: config.Unavailable, What: what + ": not available in this version", Why: why, Fix: fix})
}

func (r *reader) warn(pos config.Pos, what, why, fix string) {
	r.add(config.Problem{Pos: pos, Severity: config.Warning, What: what, Why: why, Fix: fix})
}

// at says which place of the model the latest finding is about, so that
// Validate does not say the same again.
func (r *reader) at(path string) {
	if n := len(r.problems); n > 0 {
		r.problems[n-1].Path = path
	}
}

func (r *reader) note(pos config.Pos, what, why, fix string) {
	r.add(config.Problem{Pos: pos, Severity: config.Note, What: what, Why: why, Fix: fix})
}

var property = regexp.MustCompile(`\$\{([^}]*)\}`)

// expand replaces Tomcat's properties.
func (r *reader) expand(s string, pos config.Pos) string {
	if !strings.Contains(s, "${") {
		return s
	}
	return property.ReplaceAllStringFunc(s, func(ref string) string {
		name, def, hasDefault := strings.Cut(ref[2:len(ref)-1], ":-")
		switch {
		case name == "catalina.base" || name == "catalina.home":
			return r.base
		case hasDefault:
			return def
		}
		r.warn(pos, fmt.Sprintf("the property %s is not known here", cut(ref)), "Java's system properties do not exist in this process", "write the value itself")
		return ref
	})
}

// root reads the outermost element.
func (r *reader) root(el *element, file string) bool {
	switch el.lower {
	case "server":
		r.server(el)
	case "service":
		r.service(el)
	case "engine":
		r.engine(el)
	case "host":
		r.host(el)
	case "cluster":
		r.clusterElement(el, "")
		r.note(el.pos, "the file has a Cluster and no Connector", "", "HTTP is served on 127.0.0.1:8080; --set connectors[0].address changes that")
	case "connector":
		r.connector(el)
	case "context":
		h := r.onlyHost()
		h.Contexts = append(h.Contexts, r.context(el, contextPath(file), "webapps"))
	case "web-app":
		h := r.onlyHost()
		x := config.Context{Pos: el.pos}
		r.webApp(el, &x)
		r.placeholder(&x, el.pos, "the application of this web.xml")
		h.Contexts = append(h.Contexts, x)
	default:
		return false
	}
	return true
}

// onlyHost returns the first host, which it makes if there is none.
func (r *reader) onlyHost() *config.Host {
	e := &r.cfg.Engine
	if len(e.Hosts) == 0 {
		e.Hosts = []config.Host{{Name: "localhost"}}
	}
	return &e.Hosts[0]
}

// contextPath returns the context path that a descriptor's file name stands for.
func contextPath(file string) string {
	name := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	name, _, _ = strings.Cut(name, "##") // the version
	if strings.HasSuffix(name, "ROOT") || strings.Contains(strings.ToLower(name), "context") || name == "" || name == "." {
		return ""
	}
	p := "/" + strings.ReplaceAll(name, "#", "/")
	if p != path.Clean(p) {
		return ""
	}
	return p
}

// extra reads a further file of contexts.
func (r *reader) extra(file string) {
	data, err := config.ReadFile(file)
	if err != nil {
		r.fail(config.Pos{File: file}, err.Error(), "")
		return
	}
	el, err := parse(file, data)
	if err != nil {
		r.merge(err)
		return
	}
	h := r.onlyHost()
	switch el.lower {
	case "context":
		h.Contexts = append(h.Contexts, r.context(el, contextPath(file), "webapps"))
	case "web-app":
		i := slices.IndexFunc(h.Contexts, func(x config.Context) bool { return x.Path == "" })
		if i < 0 {
			x := config.Context{Pos: el.pos}
			r.placeholder(&x, el.pos, "the application of this web.xml")
			h.Contexts = append(h.Contexts, x)
			i = len(h.Contexts) - 1
		}
		r.webApp(el, &h.Contexts[i])
	default:
		r.fail(el.pos, fmt.Sprintf("<%s> is neither Context nor web-app", cut(el.name)), "")
	}
}

// merge adds the problems of another file.
func (r *reader) merge(err error) {
	if ps, ok := err.(config.Problems); ok {
		for _, p := range ps {
			r.add(p)
		}
		return
	}
	r.fail(config.Pos{}, err.Error(), "")
}

func (r *reader) server(el *element) {
	a := r.open(el, "Server")
	if port, ok := a.number(-1, 65535, "port"); ok && port >= 0 {
		r.note(el.pos, fmt.Sprintf("the shutdown port %d is not used", port), "a node is stopped by a signal: nobody on the machine can stop it by a word", "stop it with SIGTERM (kill) or Ctrl-C")
	}
	a.ignore("shutdown address utilityThreads periodicEventDelay utilityThreadsAsDaemon")
	r.portOffset, _ = a.number(0, 65535, "portOffset")
	a.done()
	services := 0
	for _, c := range el.children {
		switch r.child(el, c, "Service Listener GlobalNamingResources Catalina") {
		case "Service":
			if services++; services > 1 {
				r.unavailable(c.pos, "a second Service in one Server", "a node has one engine", "run a second node with its own file")
				continue
			}
			r.service(c)
		case "Listener":
			r.listener(c)
		case "GlobalNamingResources":
			r.note(c.pos, "GlobalNamingResources are not used", "they are Java objects", "")
		}
	}
	if services == 0 {
		r.fail(el.pos, "the Server has no Service", "add <Service> with a Connector and an Engine")
	}
}

// quietListeners keep the Java machine healthy.
var quietListeners = []string{"AprLifecycleListener", "OpenSSLLifecycleListener", "JreMemoryLeakPreventionListener", "GlobalResourcesLifecycleListener",
	"ThreadLocalLeakPreventionListener", "VersionLoggerListener", "SecurityListener", "JasperListener", "ServerLifecycleListener", "EngineConfig",
	"HostConfig", "ContextConfig", "NamingContextListener", "StoreConfigLifecycleListener", "PropertiesRoleMappingListener", "TLSCertificateReloadListener"}

func (r *reader) listener(el *element) {
	a := r.open(el, "Listener")
	if class := a.class(); !slices.Contains(quietListeners, class) {
		r.warn(el.pos, fmt.Sprintf("the listener %s is left out", cut(class)), "listeners are Java code", "")
	}
}

func (r *reader) service(el *element) {
	a := r.open(el, "Service")
	a.ignore("name")
	a.done()
	engines := 0
	for _, c := range el.children {
		switch r.child(el, c, "Connector Engine Executor Listener") {
		case "Connector":
			r.connector(c)
		case "Engine":
			if engines++; engines > 1 {
				r.fail(c.pos, "a second Engine in one Service", "remove one of them")
				continue
			}
			r.engine(c)
		case "Executor":
			r.note(c.pos, "the Executor is not used", "requests need no pool of threads here", "")
		case "Listener":
			r.listener(c)
		}
	}
	if len(r.cfg.Connectors) == 0 {
		r.note(el.pos, "no Connector of this Service can be used", "", "HTTP is served on 127.0.0.1:8080; --set connectors[0].address changes that")
	}
}

func (r *reader) engine(el *element) {
	a := r.open(el, "Engine")
	e := &r.cfg.Engine
	e.Name, e.DefaultHost, e.Route = a.get("name"), a.get("defaultHost"), a.get("jvmRoute")
	a.ignore("backgroundProcessorDelay startStopThreads debug")
	a.done()
	for _, c := range el.children {
		switch r.child(el, c, "Host Cluster Valve Realm Listener DefaultContext Logger") {
		case "Host":
			r.host(c)
		case "Cluster":
			r.clusterElement(c, "")
		case "Valve":
			e.Valves = r.appendValve(e.Valves, c)
		case "Realm":
			r.realm(c)
		case "Listener":
			r.listener(c)
		}
	}
	if e.DefaultHost != "" && len(e.Hosts) == 0 {
		e.Hosts = []config.Host{{Name: e.DefaultHost, Pos: el.pos}}
	}
	if e.Route == "" && r.cluster != nil {
		r.warn(el.pos, "the Engine has no jvmRoute", "a balancer cannot send a user back to the node that served him before", `add jvmRoute="node1", with another name on each node, equal to the balancer's route= or worker name`)
		r.at("engine.route")
	}
}

func (r *reader) realm(el *element) {
	r.note(el.pos, "the Realm is not used", "log-in is a matter of the application here", "")
}

func (r *reader) host(el *element) {
	a := r.open(el, "Host")
	h := config.Host{Name: a.get("name"), Pos: el.pos}
	if h.Name == "" {
		r.warn(el.pos, "the Host has no name", "", `add name="localhost"`)
		h.Name = "localhost"
	}
	appBase := a.get("appBase")
	if appBase == "" {
		appBase = "webapps"
	}
	autoDeploy := a.boolean(true, "autoDeploy", "liveDeploy")
	a.ignore("unpackWARs deployOnStartup deployXML deployIgnore copyXML createDirs workDir errorReportValveClass undeployOldVersions " +
		"xmlBase xmlValidation xmlNamespaceAware startStopThreads failCtxIfServletStartFails backgroundProcessorDelay configClass contextClass " +
		"legacyAppBase hostConfigClass startChildren debug")
	a.done()
	for _, c := range el.children {
		switch r.child(el, c, "Context Alias Valve Cluster Realm Listener DefaultContext Logger") {
		case "Context":
			h.Contexts = append(h.Contexts, r.context(c, "", appBase))
		case "Alias":
			r.open(c, "Alias")
			h.Aliases = append(h.Aliases, strings.TrimSpace(c.text))
		case "Valve":
			h.Valves = r.appendValve(h.Valves, c)
		case "Cluster":
			r.clusterElement(c, h.Name)
		case "Realm":
			r.realm(c)
		case "Listener":
			r.listener(c)
		}
	}
	r.cfg.Engine.Hosts = append(r.cfg.Engine.Hosts, h)
	if autoDeploy {
		r.deployFrom(el.pos, h.Name, appBase)
	}
}

// deployFrom watches a host's appBase if the directory exists.
func (r *reader) deployFrom(pos config.Pos, host, appBase string) {
	dir := r.resolve(r.base, appBase)
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		r.note(pos, fmt.Sprintf("the directory %s does not exist: nothing is deployed from appBase", dir), "", "")
		return
	}
	r.watched = append(r.watched, watched{pos, host, dir})
}

// watched is the appBase of a host with automatic deployment.
type watched struct {
	pos       config.Pos
	host, dir string
}

// resolve returns name, below dir if it is relative.
func (r *reader) resolve(dir, name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	return filepath.Join(dir, filepath.FromSlash(name))
}

// finish does what needs the whole picture.
func (r *reader) finish() {
	e := &r.cfg.Engine
	if r.cfg.Cluster == nil && r.stores.Line != 0 {
		r.clusterForStores(r.stores)
	}
	if r.cfg.Cluster == nil {
		for _, w := range r.watched {
			r.note(w.pos, fmt.Sprintf("nothing is deployed from %s", w.dir), "the deployer belongs to the cluster, and the file has none", "add a Cluster, or a context with dir")
		}
		return
	}
	if r.clusterHost == "" {
		e.Valves = append(e.Valves, r.clusterValves...)
	}
	for i := range e.Hosts {
		h := &e.Hosts[i]
		if r.clusterHost == "" {
			continue
		}
		if strings.EqualFold(h.Name, r.clusterHost) {
			h.Valves = append(h.Valves, r.clusterValves...)
			continue
		}
		local := false
		for j := range h.Contexts {
			h.Contexts[j].Distributable = &local
		}
		r.note(h.Pos, fmt.Sprintf("sessions of the host %s are not replicated", h.Name), "the Cluster is written in the host "+r.clusterHost, "move it into the Engine to replicate those of all hosts")
	}
	for i, w := range r.watched {
		if i > 0 {
			r.unavailable(w.pos, fmt.Sprintf("deploying from a second directory, %s", w.dir), "a node has one deployer", "")
			continue
		}
		d := config.NewComponent(deployerName, map[string]any{"dir": w.dir, "host": w.host}, w.pos)
		r.cfg.Cluster.Deployer = &d
		r.note(w.pos, fmt.Sprintf("archives in %s are deployed", w.dir), "their files are served as they are; Java code in them does not run", "")
	}
}
