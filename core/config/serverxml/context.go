package serverxml

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core/config"
)

const contextUnused = "privileged antiResourceLocking antiJARLocking reloadable crossContext override swallowOutput unpackWAR useNaming workDir wrapperClass " +
	"allowCasualMultipartParsing allowLinking cacheMaxSize cacheTTL cachingAllowed caseSensitive processTlds allowMultipleLeadingForwardSlashInPath " +
	"backgroundProcessorDelay containerSciFilter dispatchersUseEncodedPaths failCtxIfServletStartFails fireRequestListenersOnForwards jndiExceptionOnFailedWrite " +
	"logEffectiveWebXml mapperContextRootRedirectEnabled mapperDirectoryRedirectEnabled preemptiveAuthentication resourceOnlyServlets sendRedirectBody " +
	"skipMemoryLeakChecksOnJvmShutdown startStopThreads suspendWrappedResponseAfterForward tldValidation useBloomFilterForArchives useRelativeRedirects " +
	"validateClientProvidedNewSessionId webappVersion xmlBlockExternal xmlNamespaceAware xmlValidation clearReferencesHttpClientKeepAliveThread " +
	"clearReferencesObjectStreamClassCaches clearReferencesRmiTargets clearReferencesStopThreads clearReferencesStopTimerThreads clearReferencesThreadLocals " +
	"renewThreadsWhenStoppingContext unloadDelay addWebinfClassesResources configFile createUploadTargets allowMultipleLeadingForwardSlashInPath " +
	"denyUncoveredHttpMethods parallelAnnotationScanning metadataComplete sessionCookiePathUsesTrailingSlash delegate debug usePartitioned alternativeLoading"

const contextChildren = "Manager Valve CookieProcessor Resources Resource ResourceLink ResourceEnvRef ResourceParams Environment Parameter Ejb Loader Realm " +
	"WatchedResource WrapperLifecycle WrapperListener InstanceListener Listener JarScanner JarScanFilter Transaction Store SessionIdGenerator Logger"

// context reads a Context. path is taken if none is written; appBase is what a
// relative docBase is relative to.
func (r *reader) context(el *element, path, appBase string) config.Context {
	a := r.open(el, "Context")
	x := config.Context{Path: path, Pos: el.pos}
	if a.has("path") {
		x.Path = a.get("path")
	}
	if x.Path == "/" {
		x.Path = ""
	}
	r.contextClass(a)
	docBase := a.get("docBase")
	if at := a.find("distributable"); at != nil {
		yes := strings.EqualFold(at.value, "true")
		x.Distributable = &yes
		r.note(at.pos, fmt.Sprintf("distributable=%q on <Context> is honoured", cut(at.value)), "Tomcat 5.5 and 6 did so too; since 7 only <distributable/> in web.xml counts", "")
	}
	x.Session.Cookie = a.get("sessionCookieName")
	x.Session.CookieDomain = a.get("sessionCookieDomain")
	x.Session.CookiePath = a.get("sessionCookiePath")
	if a.has("cookies") {
		yes := a.boolean(true, "cookies")
		x.Session.Cookies = &yes
	}
	if !a.boolean(true, "useHttpOnly") {
		r.warn(a.posOf("useHttpOnly"), "useHttpOnly=false is not done", "scripts cannot read the session cookie of this node", "")
	}
	if n, ok := a.number(-1, 1<<30, "sessionTimeout"); ok {
		x.Session.Timeout = minutes(n)
	}
	a.unused(contextUnused, "they concern Java classes and files")
	a.done()
	for _, c := range el.children {
		switch r.child(el, c, contextChildren) {
		case "Manager":
			r.contextManager(c, &x)
		case "Valve":
			x.Valves = r.appendValve(x.Valves, c)
		case "CookieProcessor":
			p := r.open(c, "CookieProcessor")
			x.Session.SameSite = strings.ToLower(p.get("sameSiteCookies"))
			if x.Session.SameSite == "unset" {
				x.Session.SameSite = ""
			}
			p.ignore("forwardSlashIsSeparator partitioned")
			p.done()
		case "Listener":
			r.listener(c)
		case "", "WatchedResource", "JarScanner", "Logger":
		default:
			r.note(c.pos, fmt.Sprintf("<%s> is not used", c.name), "it is a Java object", "")
		}
	}
	r.docBase(&x, a, docBase, appBase)
	return x
}

// contextClass reads the class of a Context: what it does here it does anyway.
func (r *reader) contextClass(a *attrs) {
	switch class := a.class(); class {
	case "", "StandardContext":
	case "ReplicatedContext":
		if text := a.get("mapSendOptions"); text != "" {
			if _, ok := parseSendOptions(text); !ok {
				r.fail(a.posOf("mapSendOptions"), fmt.Sprintf("mapSendOptions=%q is neither a number nor a list of names", cut(text)), "write for example 6, or remove it")
			} else {
				r.note(a.posOf("mapSendOptions"), "mapSendOptions of the ReplicatedContext is not read", "a change of a context attribute waits until all nodes that answer have it", "")
			}
		}
		r.note(a.posOf("className"), "the ReplicatedContext needs no word: the attributes of every context that is distributable are replicated",
			"applications use them by core/attributes; Java objects of Tomcat nodes are not shared", "")
	default:
		r.warn(a.posOf("className"), "the context class "+cut(class)+" is not known: it is read as a plain context", "", "")
	}
}

// docBase finds what a context serves.
func (r *reader) docBase(x *config.Context, a *attrs, docBase, appBase string) {
	pos := a.el.pos
	if docBase == "" {
		r.placeholder(x, pos, "this context")
		r.needsDistributable(x, pos)
		return
	}
	pos = a.posOf("docBase")
	dir := r.resolve(r.resolve(r.base, appBase), docBase)
	switch {
	case windowsPath(docBase) || !isDir(dir):
		what := "is not a directory on this machine"
		if strings.HasSuffix(strings.ToLower(docBase), ".war") {
			what = "is a Java archive"
		}
		r.warn(pos, fmt.Sprintf("docBase %s %s: the demo application is served, unless one is compiled in for its path", cut(docBase), what),
			"applications are Go handlers compiled into the node, or directories of files", "set app or dir of the context in YAML (longhouse import), or docBase to a directory")
		x.App, x.Placeholder = "demo", true
		r.needsDistributable(x, a.el.pos)
	default:
		x.Dir = dir
		if !r.webXML(x, filepath.Join(dir, "WEB-INF", "web.xml")) {
			r.needsDistributable(x, a.el.pos)
		}
	}
}

// placeholder serves the demo application for a context that names none.
func (r *reader) placeholder(x *config.Context, pos config.Pos, what string) {
	x.App, x.Placeholder = "demo", true
	r.warn(pos, "what "+what+" serves is not known: the demo application is served, unless one is compiled in for its path",
		"applications are Go handlers compiled into the node, or directories of files", "set app or dir of the context in YAML (longhouse import)")
}

// needsDistributable says what holds if neither web.xml nor the Context say
// whether sessions are replicated.
func (r *reader) needsDistributable(x *config.Context, pos config.Pos) {
	if x.Distributable == nil {
		r.note(pos, "no <distributable/> is known of this context: its sessions are replicated if there is a cluster",
			"in Tomcat an application without <distributable/> in its web.xml is not replicated", "")
	}
}

// webXML reads an application's web.xml; it reports whether there is one.
func (r *reader) webXML(x *config.Context, file string) bool {
	data, err := config.ReadFile(file)
	if err != nil {
		return false
	}
	el, err := parse(file, data)
	if err != nil {
		r.merge(err)
		return false
	}
	if el.lower != "web-app" {
		r.warn(el.pos, fmt.Sprintf("<%s> is not a web-app", cut(el.name)), "", "")
		return false
	}
	r.webApp(el, x)
	return true
}

const webAppChildren = "distributable session-config display-name description icon context-param filter filter-mapping listener servlet servlet-mapping " +
	"mime-mapping welcome-file-list error-page jsp-config taglib security-constraint login-config security-role env-entry ejb-ref ejb-local-ref service-ref " +
	"resource-ref resource-env-ref message-destination message-destination-ref locale-encoding-mapping-list persistence-context-ref persistence-unit-ref " +
	"post-construct pre-destroy data-source absolute-ordering module-name deny-uncovered-http-methods default-context-path request-character-encoding response-character-encoding"

// webApp reads a web.xml into its context.
func (r *reader) webApp(el *element, x *config.Context) {
	r.open(el, "web-app")
	distributable := false
	var java []string
	for _, c := range el.children {
		switch name := r.child(el, c, webAppChildren); name {
		case "distributable":
			r.open(c, name)
			distributable = true
		case "session-config":
			r.open(c, name)
			r.sessionConfig(c, x)
		case "", "display-name", "description", "icon":
		case "security-constraint", "login-config", "deny-uncovered-http-methods":
			r.warn(c.pos, fmt.Sprintf("<%s> is not enforced", name), "log-in is a matter of the application here", "protect what needs protection in the handlers or in front of the node")
		default:
			if !slices.Contains(java, name) {
				java = append(java, name)
			}
		}
	}
	if len(java) > 0 {
		r.note(el.pos, "not used here: <"+strings.Join(java, ">, <")+"> of the web.xml", "servlets, filters and resources are Java objects", "")
	}
	switch {
	case distributable:
		yes := true
		x.Distributable = &yes
	case x.Distributable == nil:
		no := false
		x.Distributable = &no
		r.warn(el.pos, "the web.xml has no <distributable/>: sessions of this application are not replicated",
			"Tomcat replicates only applications that ask for it", "add <distributable/>")
	}
}

func (r *reader) sessionConfig(el *element, x *config.Context) {
	for _, c := range el.children {
		text := strings.TrimSpace(c.text)
		switch r.child(el, c, "session-timeout cookie-config tracking-mode") {
		case "session-timeout":
			n, err := strconv.Atoi(text)
			if err != nil || n > 1<<30 || n < -1<<30 {
				r.fail(c.pos, fmt.Sprintf("the session-timeout %q is not a number of minutes", cut(text)), "write for example 30")
				continue
			}
			x.Session.Timeout = minutes(n)
		case "tracking-mode":
			if strings.EqualFold(text, "URL") && x.Session.Cookies == nil {
				no := false
				x.Session.Cookies = &no
			} else if strings.EqualFold(text, "COOKIE") {
				yes := true
				x.Session.Cookies = &yes
			}
		case "cookie-config":
			r.cookieConfig(c, x)
		}
	}
}

func (r *reader) cookieConfig(el *element, x *config.Context) {
	for _, c := range el.children {
		text := strings.TrimSpace(c.text)
		switch r.child(el, c, "name domain path comment http-only secure max-age attribute") {
		case "name":
			x.Session.Cookie = text
		case "domain":
			x.Session.CookieDomain = text
		case "path":
			x.Session.CookiePath = text
		case "http-only":
			if !strings.EqualFold(text, "true") {
				r.warn(c.pos, "http-only=false is not done", "scripts cannot read the session cookie of this node", "")
			}
		case "max-age":
			if n, err := strconv.Atoi(text); err != nil || n >= 0 {
				r.warn(c.pos, "max-age of the session cookie is not set", "the cookie lives as long as the browser", "")
			}
		case "secure":
			r.note(c.pos, "secure is not read", "the cookie is secure whenever the request came by TLS", "")
		case "attribute":
			for _, at := range c.children {
				if at.lower == "attribute-value" && strings.Contains(strings.ToLower(c.childText("attribute-name")), "samesite") {
					x.Session.SameSite = strings.ToLower(strings.TrimSpace(at.text))
				}
			}
		}
	}
}

// childText returns the text of a child element.
func (el *element) childText(lower string) string {
	for _, c := range el.children {
		if c.lower == lower {
			return strings.TrimSpace(c.text)
		}
	}
	return ""
}

// minutes returns a session's life; 0 and less are for ever.
func minutes(n int) *time.Duration {
	d := time.Duration(max(n, 0)) * time.Minute
	return &d
}
