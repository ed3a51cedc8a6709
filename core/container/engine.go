package container

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/attributes"
	"github.com/longhouse-go/longhouse/core/config"
)

// newEngine builds the tree of containers that cfg describes, on the node's
// running session tables.
func (n *Node) newEngine(cfg *config.Config) (*core.Engine, error) {
	level := core.Async
	if cfg.Cluster != nil {
		var err error
		if level, err = parseLevel(cfg.Cluster.Send); err != nil {
			return nil, err
		}
	}
	o := core.EngineOptions{
		Name:        cfg.Engine.Name,
		Route:       cfg.Engine.Route,
		DefaultHost: cfg.Engine.DefaultHost,
		Shared:      n.sharedSessions(),
		Ready:       n.readyError,
		Draining:    n.drain.is,
	}
	var errs []error
	var err error
	if o.Valves, err = n.buildValves(cfg.Engine.Valves); err != nil {
		errs = append(errs, err)
	}
	for i, h := range cfg.Engine.Hosts {
		ho := core.HostOptions{Name: h.Name, Aliases: h.Aliases}
		if ho.Valves, err = n.buildValves(h.Valves); err != nil {
			errs = append(errs, err)
		}
		contexts := withApps(n.parts.Apps, h, isDefaultHost(cfg, i))
		if len(h.Contexts) == 0 && len(contexts) == 1 && contexts[0].App == DemoApp {
			n.log.Warn("no application is configured for this host: it serves the demo application", zap.String("host", h.Name))
		}
		for _, x := range contexts {
			co, err := n.contextOptions(cfg, h, x, level)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			ho.Contexts = append(ho.Contexts, co)
		}
		o.Hosts = append(o.Hosts, ho)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return core.NewEngine(o, n.settings("engine"))
}

// sharedSessions are those of the cluster's manager, or those of this node.
func (n *Node) sharedSessions() core.Sessions {
	if n.cluster != nil {
		return n.cluster.sessions[0].table
	}
	return n.local.table
}

func isDefaultHost(cfg *config.Config, i int) bool {
	return strings.EqualFold(cfg.Engine.Hosts[i].Name, cfg.Engine.DefaultHost) || cfg.Engine.DefaultHost == "" && i == 0
}

// withApps returns the contexts of a host: the configured ones, those of
// applications that bring their own path, and the demo application for a host
// that would be empty.
func withApps(apps []App, h config.Host, isDefault bool) []config.Context {
	list := append([]config.Context(nil), h.Contexts...)
	at := map[string]int{}
	for i, x := range list {
		at[strings.TrimSuffix(x.Path, "/")] = i
	}
	for _, a := range apps {
		if a.Path == nil || !isDefault {
			continue
		}
		path := strings.TrimSuffix(*a.Path, "/")
		if i, configured := at[path]; !configured {
			at[path] = len(list)
			list = append(list, config.Context{Path: path, App: a.Name})
		} else if list[i].Placeholder || list[i].App == "" && list[i].Dir == "" {
			list[i].App = a.Name
		}
	}
	if len(list) == 0 && findApp(apps, DemoApp) != nil {
		list = append(list, config.Context{App: DemoApp})
	}
	return list
}

func findApp(apps []App, name string) *App {
	for i := range apps {
		if apps[i].Name == name {
			return &apps[i]
		}
	}
	return nil
}

func (n *Node) contextOptions(cfg *config.Config, h config.Host, x config.Context, level core.Level) (core.ContextOptions, error) {
	path := strings.TrimSuffix(x.Path, "/")
	name := core.ContextName(h.Name, path)
	fail := func(err error) (core.ContextOptions, error) {
		return core.ContextOptions{}, fmt.Errorf("%s: context %s: %w", x.Pos, name, err)
	}
	distributable := cfg.Cluster != nil && (x.Distributable == nil || *x.Distributable)
	attrs := n.attributes.Context(name, distributable, attributes.Limits{MaxCount: x.Attributes.MaxCount, MaxSize: x.Attributes.MaxSize})
	info := AppInfo{Node: n.name, Context: name, Attributes: attrs}
	handler, err := n.handler(x, info)
	if err != nil {
		return fail(err)
	}
	valves, err := n.buildValves(x.Valves)
	if err != nil {
		return fail(err)
	}
	o := core.ContextOptions{
		Path:          path,
		Handler:       handler,
		Valves:        valves,
		Distributable: distributable,
		Attributes:    attrs,
		Level:         level,
		Tracking:      tracking(x.Session),
		MaxInactive:   sessionTimeout(x.Session),
	}
	if a := findApp(n.parts.Apps, x.App); a != nil && a.Listeners != nil {
		o.Listeners = a.Listeners(info)
	}
	locks := n.locks
	if o.Distributable {
		o.ClusterEvents = clusterEvents(cmp.Or(x.Session.Listeners, cfg.Cluster.Listeners))
		if x.Send != "" {
			if o.Level, err = parseLevel(x.Send); err != nil {
				return fail(err)
			}
		}
		o.Sessions = n.cluster.tableFor(name)
		locks = n.cluster.locks
	} else {
		o.Sessions = n.local.table
	}
	if x.Session.Lock == "session" {
		o.Locker, o.LockTimeout = locks.With(x.Session.LockLease), x.Session.LockTimeout
	}
	return o, nil
}

// clusterEvents are the kinds that listeners hear of other nodes.
func clusterEvents(listeners string) (kinds core.SessionEventKind) {
	sessions, ids, attributes, _ := config.ListenerKinds(listeners) // the validation has refused others
	if sessions {
		kinds |= core.SessionCreated | core.SessionDestroyed
	}
	if ids {
		kinds |= core.SessionRenewed
	}
	if attributes {
		kinds |= core.AttributeEvents
	}
	return kinds
}

var errNoApp = errors.New("it has neither an application (app) nor a directory (dir), and none is compiled in for its path")

// defaultTimeout is the life of a session without a request (Tomcat's default).
const defaultTimeout = 30 * time.Minute

func sessionTimeout(s config.Session) time.Duration {
	if s.Timeout == nil {
		return defaultTimeout
	}
	return *s.Timeout
}

func tracking(s config.Session) core.Tracking {
	t := core.Tracking{Cookie: s.Cookie, CookiePath: s.CookiePath, CookieDomain: s.CookieDomain, NoCookies: s.Cookies != nil && !*s.Cookies}
	switch strings.ToLower(s.SameSite) {
	case "strict":
		t.SameSite = http.SameSiteStrictMode
	case "none":
		t.SameSite = http.SameSiteNoneMode
	default:
		t.SameSite = http.SameSiteLaxMode
	}
	return t
}

func (n *Node) handler(x config.Context, info AppInfo) (http.Handler, error) {
	switch {
	case x.App != "":
		a := findApp(n.parts.Apps, x.App)
		if a == nil {
			return nil, fmt.Errorf("application %q is not compiled in", x.App)
		}
		return a.New(info), nil
	case x.Dir != "":
		return dirHandler(x.Dir)
	}
	return nil, errNoApp
}

// dirHandler serves static files. It cannot be led out of dir by links or
// names, and hides what Tomcat hides.
func dirHandler(dir string) (http.Handler, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot open the application's directory: %w", err)
	}
	// root stays open as long as the handler is reachable; the garbage
	// collector closes it after that.
	files := http.FileServerFS(root.FS())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for segment := range strings.SplitSeq(strings.ToUpper(r.URL.Path), "/") {
			if segment == "WEB-INF" || segment == "META-INF" {
				http.NotFound(w, r)
				return
			}
		}
		files.ServeHTTP(w, r)
	}), nil
}

// buildValves makes the valves of a pipeline in the order of the list.
func (n *Node) buildValves(list []config.Component) ([]core.Valve, error) {
	valves := make([]core.Valve, 0, len(list))
	var errs []error
	for _, c := range list {
		f, err := n.valves.Get(c.Use)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.Pos, err))
			continue
		}
		v, err := f.New(c.Decode, n.settings("valve."+c.Use))
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: valve %s: %w", c.Pos, c.Use, err))
			continue
		}
		valves = append(valves, v)
	}
	return valves, errors.Join(errs...)
}

// deployHost puts what a deployer brings into the engine.
type deployHost struct{ n *Node }

// Apply serves an unpacked bundle as static files.
func (d deployHost) Apply(ctx context.Context, b core.Bundle) error {
	if now, ok := d.n.deployed.Load(deployKey{b.Host, b.Path}); ok && now == b {
		return nil // the deployer has been restarted
	}
	if err := d.apply(ctx, d.n.engine(), b); err != nil {
		return err
	}
	d.n.deployed.Store(deployKey{b.Host, b.Path}, b)
	d.n.log.Info("application deployed", zap.String("host", b.Host), zap.String("path", b.Path), zap.String("version", b.Version))
	return nil
}

func (d deployHost) apply(ctx context.Context, e *core.Engine, b core.Bundle) error {
	handler, err := dirHandler(b.Dir)
	if err != nil {
		return err
	}
	host := b.Host
	if host == "" && e.DefaultHost() != nil {
		host = e.DefaultHost().Name()
	}
	level := core.Async
	o := core.ContextOptions{Path: b.Path, Version: b.Version, Handler: handler, MaxInactive: defaultTimeout, Sessions: d.n.local.table}
	if d.n.cfg.Cluster != nil {
		if level, err = parseLevel(d.n.cfg.Cluster.Send); err != nil {
			return err
		}
		o.Sessions, o.Distributable, o.Level = d.n.cluster.tableFor(core.ContextName(host, b.Path)), true, level
	}
	o.Attributes = d.n.attributes.Context(core.ContextName(host, b.Path), o.Distributable, attributes.Limits{})
	_, err = e.SetContext(ctx, b.Host, o)
	return err
}

// Remove takes a bundle out of service.
func (d deployHost) Remove(ctx context.Context, host, path string) error {
	d.n.deployed.Delete(deployKey{host, path})
	err := d.n.engine().RemoveContext(ctx, host, path)
	if errors.Is(err, core.ErrNoContext) {
		return nil // it is gone already
	}
	if err == nil {
		d.n.log.Info("application removed", zap.String("host", host), zap.String("path", path))
	}
	return err
}

type deployKey struct{ host, path string }

// settings returns what a component of that name is given.
func (n *Node) settings(name string) channel.Settings {
	return channel.Settings{Name: name, Logger: n.log.Named(name), Net: n.net, Metrics: n.metrics, WorkDir: n.workDir}
}
