package serverxml

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/longhouse-go/longhouse/core/config"
)

// storeManager reads a manager that keeps sessions outside of the nodes; ok is
// false if the class is none.
func (r *reader) storeManager(class string, a *attrs) (m config.Component, ok bool) {
	pos := a.el.pos
	switch class {
	case "MemcachedBackupSessionManager", "DummyMemcachedBackupSessionManager":
		return r.memcached(a), true
	case "RedisSessionManager", "RedissonSessionManager":
		return r.redis(class, a), true
	case "PersistentManager":
		return r.persistent(a), true
	}
	return config.Component{Pos: pos}, false
}

// memcached reads a memcached-session-manager.
func (r *reader) memcached(a *attrs) config.Component {
	o := map[string]any{}
	use := "memcached"
	nodes := a.get("memcachedNodes")
	switch u, err := url.Parse(nodes); {
	case nodes == "":
		r.fail(a.el.pos, "the manager has no memcachedNodes", `write for example memcachedNodes="n1:127.0.0.1:11211"`)
	case err == nil && (u.Scheme == "redis" || u.Scheme == "rediss"):
		use = "redis"
		redisURL(u, o)
	case err == nil && (u.Scheme == "http" || u.Scheme == "https"):
		r.unavailable(a.posOf("memcachedNodes"), "a Couchbase pool", "nodes are listed", `write memcachedNodes="n1:host:11211"`)
	default:
		o["nodes"] = list(nodes)
	}
	if v := a.get("failoverNodes"); v != "" {
		o["failover"] = list(v)
	}
	if d, ok := a.millis("operationTimeout"); ok && d > 0 {
		o["operation_timeout"] = d
	}
	wait := !a.boolean(true, "sessionBackupAsync")
	if d, ok := a.millis("sessionBackupTimeout"); ok && d > 0 && wait {
		o["grace"] = d
	}
	if wait {
		r.note(a.posOf("sessionBackupAsync"), "sessionBackupAsync=false means: a request waits for the store, for the sessionBackupTimeout at most",
			"here all managers wait as the send of the cluster says", "set cluster.send: sync")
		r.waits = true
	}
	if n, ok := a.number(1, 1024, "backupThreadCount"); ok {
		o["parallel"] = n
	}
	var prefix []string
	for _, part := range list(a.get("storageKeyPrefix")) {
		if v, ok := strings.CutPrefix(part, "static:"); ok {
			prefix = append(prefix, v)
		}
	}
	if len(prefix) > 0 {
		o["prefix"] = strings.Join(prefix, ":") + "_"
	}
	if !a.boolean(true, "sticky") {
		r.note(a.posOf("sticky"), "sticky=false: every node may serve every request", "the nodes tell each other what has changed, so that none serves an old session", "")
	}
	if mode := a.get("lockingMode"); mode != "" && mode != "none" {
		r.note(a.posOf("lockingMode"), fmt.Sprintf("lockingMode=%s is not needed for most: parallel changes of different attributes are merged", cut(mode)),
			"in Tomcat the last writer wins, and a lock is given up after a second", "use Update for changes that depend on the old value")
	}
	for _, name := range []string{"requestUriIgnorePattern", "sessionAttributeFilter"} {
		if a.get(name) != "" {
			r.warn(a.posOf(name), name+" is not used", "a request that changes nothing writes nothing", "")
		}
	}
	if !a.boolean(true, "enabled") {
		r.warn(a.posOf("enabled"), "enabled=false is not done", "", "remove the manager")
	}
	if v := a.get("transcoderFactoryClass"); v != "" {
		r.note(a.posOf("transcoderFactoryClass"), "the transcoder is not used: sessions are not shared with Java nodes in memcached", "values are Go's, as CBOR", "")
	}
	r.secretAttr(a, "password", o, use == "redis")
	a.ignore("copyCollectionsForSerialization customConverter username memcachedProtocol lockExpiration backupThreadCount")
	return config.NewComponent(use, o, a.el.pos)
}

// secretAttr takes over a password, where there is an option for it.
func (r *reader) secretAttr(a *attrs, name string, o map[string]any, has bool) {
	v := a.get(name)
	switch {
	case v == "":
	case has:
		o["password"] = v
	default:
		r.warn(a.posOf(name), "the "+name+" is not used", "memcached is reached without one", "use a network that only the nodes reach")
	}
}

// list splits what is separated by spaces or commas.
func list(text string) []string {
	return strings.FieldsFunc(text, func(c rune) bool { return c == ' ' || c == ',' || c == ';' || c == '\t' || c == '\n' || c == '\r' })
}

// redisURL reads redis://user:password@host:port/database.
func redisURL(u *url.URL, o map[string]any) {
	host := u.Host
	if u.Port() == "" {
		host += ":6379"
	}
	o["addresses"] = []string{host}
	if u.Scheme == "rediss" {
		o["tls"] = true
	}
	if name := u.User.Username(); name != "" {
		o["username"] = name
	}
	if p, ok := u.User.Password(); ok {
		o["password"] = p
	}
	if db := strings.Trim(u.Path, "/"); db != "" && strings.Trim(db, "0123456789") == "" && len(db) < 6 {
		n := 0
		for _, c := range db {
			n = n*10 + int(c-'0')
		}
		o["database"] = n
	}
}

// redis reads the managers for Redis that are in use.
func (r *reader) redis(class string, a *attrs) config.Component {
	o := map[string]any{}
	if class == "RedissonSessionManager" {
		r.warn(a.el.pos, "the configPath of the RedissonSessionManager is not read", "it is a file of Redisson", "set addresses of the manager redis")
		a.ignore("configPath readMode updateMode broadcastSessionUpdates keyPrefix")
		return config.NewComponent("redis", o, a.el.pos)
	}
	if u, err := url.Parse(a.get("redisUrl")); err == nil && u.Host != "" {
		redisURL(u, o)
	}
	host, port := a.get("host"), 6379
	if n, ok := a.number(1, 65535, "port"); ok {
		port = n
	}
	if host != "" {
		o["addresses"] = []string{fmt.Sprintf("%s:%d", host, port)}
	}
	if n, ok := a.number(0, 1<<16, "database"); ok {
		o["database"] = n
	}
	r.secretAttr(a, "password", o, true)
	return config.NewComponent("redis", o, a.el.pos)
}

// persistent reads a PersistentManager with its Store.
func (r *reader) persistent(a *attrs) config.Component {
	o := map[string]any{}
	if n, ok := a.number(-1, 1<<30, "maxIdleBackup"); ok && n >= 0 {
		r.note(a.posOf("maxIdleBackup"), fmt.Sprintf("maxIdleBackup=%d is not waited for: every change is stored at once", n), "in Tomcat everything younger is lost with the node", "set delay of the manager to write less often")
	}
	for _, name := range []string{"minIdleSwap", "maxIdleSwap"} {
		if n, ok := a.number(-1, 1<<30, name); ok && n >= 0 {
			r.note(a.posOf(name), name+" is not used: sessions leave this node's memory when nobody has used them for five minutes", "they are in the store all the time", "")
		}
	}
	if a.has("saveOnRestart") && !a.boolean(true, "saveOnRestart") {
		r.warn(a.posOf("saveOnRestart"), "saveOnRestart=false is not done", "sessions survive a restart", "")
	}
	found := false
	for _, c := range a.el.children {
		if strings.EqualFold(c.name, "Store") {
			found = true
			r.store(c, o)
		}
	}
	if !found {
		r.fail(a.el.pos, "the PersistentManager has no Store", `add <Store className="org.apache.catalina.session.FileStore" directory="/var/lib/sessions"/>`)
	}
	return config.NewComponent("persistent", o, a.el.pos)
}

// store reads the Store of a PersistentManager.
func (r *reader) store(el *element, o map[string]any) {
	a := r.open(el, "Store")
	switch class := a.class(); class {
	case "FileStore":
		o["store"] = "file"
		if v := a.get("directory"); v != "" {
			o["directory"] = v
		}
	case "JDBCStore", "DataSourceStore":
		dsn := a.get("connectionURL")
		switch {
		case strings.HasPrefix(dsn, "jdbc:postgresql:"):
			o["store"] = "postgres"
			rest := strings.TrimPrefix(dsn, "jdbc:postgresql:")
			u, err := url.Parse("postgres:" + rest)
			if err == nil {
				q := u.Query()
				user, password := q.Get("user"), q.Get("password")
				if v := a.get("connectionName"); v != "" {
					user = v
				}
				if v := a.get("connectionPassword"); v != "" {
					password = v
				}
				q.Del("user")
				q.Del("password")
				u.RawQuery = q.Encode()
				if user != "" {
					u.User = url.User(user)
				}
				if password != "" {
					o["password"] = password
				}
				rest = u.String()
			}
			o["dsn"] = rest
		case strings.HasPrefix(dsn, "jdbc:sqlite:"):
			o["store"], o["file"] = "sqlite", strings.TrimPrefix(dsn, "jdbc:sqlite:")
		default:
			r.unavailable(el.pos, "the database of the "+class, "PostgreSQL and SQLite are there; with --lenient sessions are kept in files", "set store and dsn of the manager persistent in YAML")
			o["store"] = "file"
		}
		r.note(el.pos, "sessions are kept in a table of their own, longhouse_sessions", "Tomcat's table holds Java objects", "set table of the manager to choose another name")
		a.ignore("driverName connectionName connectionPassword dataSourceName localDataSource sessionTable sessionAppCol sessionDataCol sessionIdCol " +
			"sessionLastAccessedCol sessionMaxInactiveCol sessionValidCol")
	default:
		r.unavailable(el.pos, "the store "+cut(class), "with --lenient sessions are kept in files", "use FileStore, or write a store as a plugin")
		o["store"] = "file"
	}
	a.ignore("checkInterval")
	a.done()
}

// clusterForStores gives a node without a Cluster the means to tell other nodes
// what has changed in the store.
func (r *reader) clusterForStores(pos config.Pos) {
	cl := &config.Cluster{Pos: pos, Send: "async", Manager: config.Component{Use: managerName, Pos: pos}}
	if r.waits {
		cl.Send = "sync"
	}
	cl.Channel.Membership = config.Component{Use: membershipName, Pos: pos}
	cl.Channel.Receiver.Address = "127.0.0.1"
	cl.Channel.Interceptors = r.defaultInterceptors(pos)
	r.cfg.Cluster = cl
	r.warn(pos, "sessions are in a store, but there is no Cluster: nodes on this machine find each other, others do not",
		"the nodes tell each other what has changed, so that none serves an old copy", "write a Cluster, or set cluster.channel.receiver.address and the membership")
}
