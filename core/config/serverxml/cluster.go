package serverxml

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core/config"
)

// clusterElement reads a Cluster that is written in the given host, "" for the
// engine.
func (r *reader) clusterElement(el *element, host string) {
	a := r.open(el, "Cluster")
	if r.cluster != nil {
		r.unavailable(el.pos, "a second Cluster", fmt.Sprintf("a node has one; the first is in line %d", r.cluster.pos.Line), "write one Cluster into the Engine")
		return
	}
	switch class := a.class(); class {
	case "SimpleTcpCluster":
		r.oldPackage(a, "org.apache.catalina.ha.tcp.SimpleTcpCluster")
	case "":
		r.warn(el.pos, "the Cluster has no className: SimpleTcpCluster is meant", "Tomcat does not start without it", `add className="org.apache.catalina.ha.tcp.SimpleTcpCluster"`)
	default:
		r.unavailable(a.posOf("className"), "the cluster class "+cut(class), "", `use className="org.apache.catalina.ha.tcp.SimpleTcpCluster"`)
		return
	}
	r.cluster, r.clusterHost = el, host
	cl := &config.Cluster{Pos: el.pos, Manager: config.Component{Use: managerName, Pos: el.pos}}
	cl.Channel.Membership = config.Component{Use: membershipName, Pos: el.pos}
	cl.Channel.Receiver.Address = "auto"
	r.cfg.Cluster = cl

	send, written := a.get("channelSendOptions"), a.has("channelSendOptions")
	cl.Listeners = r.listeners(a)
	if class := a.get("managerClassName"); class != "" {
		r.clusterManager(class[strings.LastIndexByte(class, '.')+1:], a.posOf("managerClassName"))
	}
	if a.boolean(false, "expireSessionsOnShutdown") {
		r.expireOnShutdown(a.posOf("expireSessionsOnShutdown"))
	}
	if n, ok := a.number(0, 15, "channelStartOptions"); ok && n != 15 {
		r.warn(a.posOf("channelStartOptions"), fmt.Sprintf("channelStartOptions=%d is not done: the node sends, receives and takes part in the membership", n), "", "remove it")
	}
	a.ignore("clusterName heartbeatBackgroundEnabled notifyLifecycleListenerOnFailure useDirtyFlag printToScreen debug " +
		"doClusterLog clusterLogName service protocol replicationMode info")
	a.done()

	oldSend, mapSend, mapPos := "", "", el.pos
	channelSeen := false
	for _, c := range el.children {
		switch r.child(el, c, "Manager Channel Valve ClusterListener Deployer Membership Receiver Sender Listener") {
		case "Manager":
			ma := r.open(c, "Manager")
			r.clusterManager(ma.class(), c.pos)
			mapSend, mapPos = ma.get("mapSendOptions"), ma.posOf("mapSendOptions")
			r.managerAttrs(ma, &cl.Manager, nil)
		case "Channel":
			channelSeen = true
			r.channel(c, cl)
		case "Membership": // 5.5: directly in the Cluster
			r.membership(c, cl)
		case "Receiver":
			r.receiver(c, cl)
		case "Sender":
			oldSend = r.sender(c, cl)
		case "Valve":
			if r.clusterValves == nil {
				r.clusterValves = []config.Component{}
			}
			r.clusterValves = r.appendValve(r.clusterValves, c)
		case "ClusterListener":
			r.clusterListener(c)
		case "Deployer":
			r.deployer(c, host)
		case "Listener":
			r.listener(c)
		}
	}
	if !channelSeen {
		cl.Channel.Interceptors = r.defaultInterceptors(el.pos)
	}
	switch {
	case cl.Manager.Use == backupName:
		cl.Send = r.mapSendOptions(mapSend, mapPos, written, a.posOf("channelSendOptions"))
	case written:
		cl.Send = r.sendOptions(send, a.posOf("channelSendOptions"))
	case oldSend != "":
		cl.Send = oldSend
	default:
		cl.Send = "async"
	}
	r.defaultValves(el)
	if !r.receiverSeen {
		r.note(el.pos, "the receiver listens on this machine's first address that is not loopback, on port 4000 or the next free one", "that is Tomcat's default",
			"--set cluster.channel.receiver.address=127.0.0.1 for nodes on one machine")
	}
}

// oldPackage says that a class has moved.
func (r *reader) oldPackage(a *attrs, now string) {
	if full := a.el.attr("className"); strings.HasPrefix(full, "org.apache.catalina.cluster.") {
		r.note(a.posOf("className"), full+" is the name of Tomcat 5.5; it is understood", "Tomcat 6 and later call it "+now+" and do not start with this one", "")
	}
}

// attr returns an attribute as it is written.
func (el *element) attr(name string) string {
	for _, a := range el.attrs {
		if strings.EqualFold(a.name, name) {
			return strings.TrimSpace(a.value)
		}
	}
	return ""
}

// sendBits are Tribes' send options.
var sendBits = []struct {
	bit   int
	name  string
	words string
}{
	{1, "byte_message", "byte message"}, {2, "use_ack", "use acknowledgement"}, {4, "synchronized_ack", "synchronized acknowledgement"},
	{8, "asynchronous", "asynchronous"}, {16, "secure", "secure"}, {32, "udp", "UDP"}, {64, "multicast", "multicast"},
}

// sendOptions translates channelSendOptions, a number or names, and says in words
// what they mean.
func (r *reader) sendOptions(text string, pos config.Pos) string {
	n, ok := parseSendOptions(text)
	if !ok {
		r.fail(pos, fmt.Sprintf("channelSendOptions=%q is neither a number nor a list of names", cut(text)), "write for example 8 (asynchronous) or 6 (every node has applied the change)")
		return "async"
	}
	var words []string
	for _, b := range sendBits {
		if n&b.bit != 0 {
			words = append(words, fmt.Sprintf("%d %s", b.bit, b.words))
		}
	}
	if len(words) == 0 {
		words = []string{"no wait"}
	}
	if n>>7 != 0 {
		r.warn(pos, fmt.Sprintf("channelSendOptions=%s has bits that Tribes does not define", cut(text)), "", "")
	}
	if n&16 != 0 {
		r.warn(pos, "channelSendOptions asks for secure messages: they are sent in the clear", "Tomcat has no such transport either", "use a network that only the nodes reach")
	}
	if n&(32|64) != 0 {
		r.warn(pos, "channelSendOptions asks for UDP or multicast: sessions are sent by TCP", "datagrams may be lost", "")
	}
	level, meaning := "async", "a request does not wait; what is queued when a node dies is lost"
	switch {
	case n&8 != 0:
	case n&4 != 0:
		level, meaning = "sync", "a request waits until every other node has applied its changes"
	case n&2 != 0:
		level, meaning = "ack", "a request waits until every other node has received its changes"
	default:
		meaning = "a request does not wait, and nobody acknowledges"
	}
	r.note(pos, fmt.Sprintf("channelSendOptions=%s (%s) means: %s; here send: %s", cut(text), strings.Join(words, " + "), meaning, level), "", "")
	return level
}

func parseSendOptions(text string) (int, bool) {
	if n, err := strconv.ParseInt(text, 10, 32); err == nil && n >= 0 {
		return int(n), true
	}
	aliases := map[string]int{"async": 8, "sync_ack": 4, "sync": 4, "byte": 1}
	n := 0
	for word := range strings.SplitSeq(strings.ToLower(text), ",") {
		word = strings.TrimSpace(word)
		bit := aliases[word]
		for _, b := range sendBits {
			if b.name == word {
				bit = b.bit
			}
		}
		if bit == 0 {
			return 0, false
		}
		n |= bit
	}
	return n, true
}

// clusterManager reads the class of the template of managers.
func (r *reader) clusterManager(class string, pos config.Pos) {
	switch {
	case class == "DeltaManager" || class == "":
		r.cfg.Cluster.Manager = config.Component{Use: managerName, Pos: pos}
	case class == "BackupManager":
		r.cfg.Cluster.Manager = config.Component{Use: backupName, Pos: pos}
	default:
		r.missingManager(class, pos, "the delta manager, which keeps every session on every node, takes its place")
	}
}

// mapSendOptions translates the send options of the BackupManager, which does not
// use those of the cluster.
func (r *reader) mapSendOptions(text string, pos config.Pos, channel bool, channelPos config.Pos) string {
	if channel {
		r.note(channelPos, "channelSendOptions is not used for sessions: the BackupManager has mapSendOptions", "Tomcat sends only session events and applications with it", "")
	}
	if text == "" {
		text = "6"
	}
	n, ok := parseSendOptions(text)
	if !ok {
		r.fail(pos, fmt.Sprintf("mapSendOptions=%q is neither a number nor a list of names", cut(text)), "write for example 8 (asynchronous) or 6 (a copy has been stored)")
		return "async"
	}
	level, meaning := "async", "a request does not wait"
	switch {
	case n&8 != 0:
	case n&4 != 0:
		level, meaning = "sync", "a request waits until the copies of its session have its changes"
	case n&2 != 0:
		level, meaning = "ack", "a request waits until the nodes with copies of its session have received its changes"
	}
	r.note(pos, fmt.Sprintf("mapSendOptions=%s means: %s; here send: %s", cut(text), meaning, level), "", "")
	return level
}

func (r *reader) missingManager(class string, pos config.Pos, instead string) {
	why, fix := whyMissing(class, missingManagers, "use org.apache.catalina.ha.session.DeltaManager", "DeltaManager", "BackupManager", "StandardManager")
	r.unavailable(pos, "the manager "+cut(class), why+"; with --lenient "+instead, fix)
}

func (r *reader) expireOnShutdown(pos config.Pos) {
	r.warn(pos, "expireSessionsOnShutdown=true is not done", "sessions go on on the other nodes when a node stops", "set it to false")
}

// replication reads the attributes that a manager of ours has an option for.
func (r *reader) replication(a *attrs, m *config.Component) {
	o := map[string]any{}
	if m.Use == backupName {
		if d, ok := a.millis("rpcTimeout"); ok && d > 0 {
			o["state_transfer_timeout"] = d
		}
		if d, ok := a.millis("accessTimeout"); ok && d > 0 {
			o["stall_timeout"] = d
		}
		if a.boolean(false, "terminateOnStartFailure") {
			o["terminate_on_start_failure"] = true
		}
	} else if n, ok := a.number(-1, 1<<20, "stateTransferTimeout"); ok {
		o["state_transfer_timeout"] = time.Duration(n) * time.Second
	}
	if a.boolean(false, "sendClusterDomainOnly", "domainReplication") {
		o["domain_only"] = true
	}
	if len(o) > 0 && (m.Use == managerName || m.Use == backupName) {
		*m = config.NewComponent(m.Use, o, m.Pos)
	}
}

// listeners reads which session listeners hear of other nodes; empty if nothing
// is written about that. What Tomcat fires on nodes that a change reaches, a node
// here tells as another node's.
func (r *reader) listeners(a *attrs) string {
	kinds := []struct{ attr, kind string }{
		{"notifySessionListenersOnReplication", "sessions"},
		{"notifyContainerListenersOnReplication", "ids"},
		{"notifyListenersOnReplication", "attributes"},
	}
	var on []string
	written := false
	for _, k := range kinds {
		written = written || a.has(k.attr)
		if a.boolean(true, k.attr) {
			on = append(on, k.kind)
		}
	}
	switch {
	case a.boolean(false, "broadcastSessionEvents"): // Redisson's
		return "sessions"
	case !written:
		return ""
	case len(on) == 0:
		return "local"
	case len(on) == len(kinds):
		return "cluster"
	}
	return strings.Join(on, ", ")
}

// managerAttrs reads the attributes of any manager; m is the manager that it
// becomes, or nil, and x its context, or nil.
func (r *reader) managerAttrs(a *attrs, m *config.Component, x *config.Context) {
	if m != nil {
		r.replication(a, m)
	}
	if a.boolean(false, "expireSessionsOnShutdown") {
		r.expireOnShutdown(a.posOf("expireSessionsOnShutdown"))
	}
	if n, ok := a.number(-1, 1<<30, "maxInactiveInterval"); ok {
		if x != nil {
			d := time.Duration(max(n, 0)) * time.Second
			x.Session.Timeout = &d
		} else {
			r.warn(a.posOf("maxInactiveInterval"), "maxInactiveInterval of the cluster's manager is not used", "the life of sessions belongs to a context", "set session.timeout of the contexts")
		}
	}
	if n, ok := a.number(-1, 1<<30, "maxActiveSessions"); ok && n >= 0 {
		r.warn(a.posOf("maxActiveSessions"), fmt.Sprintf("maxActiveSessions=%d is not enforced", n), "the session table has its own bound", "")
	}
	for _, f := range []string{"sessionAttributeNameFilter", "sessionAttributeValueClassNameFilter"} {
		if a.get(f) != "" {
			r.warn(a.posOf(f), f+" is not used", "all attributes are replicated", "")
		}
	}
	switch l := r.listeners(a); {
	case l == "":
	case x != nil:
		x.Session.Listeners = l
	case r.cfg.Cluster != nil:
		r.cfg.Cluster.Listeners = l
	}
	a.ignore("name sendAllSessions " +
		"sendAllSessionsSize sendAllSessionsWaitTime stateTimestampDrop enableStatistics recordAllActions processExpiresFrequency warnOnSessionAttributeFilterFailure " +
		"secureRandomClass secureRandomProvider secureRandomAlgorithm sessionIdLength mapSendOptions rpcTimeout accessTimeout terminateOnStartFailure " +
		"persistAuthentication pathname useDirtyFlag randomClass algorithm entropy distributable mode debug updateActiveInterval " +
		"expireTolerance printToScreen replicationMode persistAuthenticationNotes sessionActivityCheck sessionLastAccessAtStart jvmRoute")
	a.unused("memcachedNodes failoverNodes sticky lockingMode sessionBackupAsync sessionBackupTimeout transcoderFactoryClass backupThreadCount "+
		"requestUriIgnorePattern sessionAttributeFilter copyCollectionsForSerialization customConverter storageKeyPrefix username password memcachedProtocol "+
		"operationTimeout enabled saveOnRestart maxIdleBackup minIdleSwap maxIdleSwap host port database redisUrl",
		"this manager does not have them")
	a.done()
	for _, c := range a.el.children {
		switch r.child(a.el, c, "SessionIdGenerator Store") {
		case "SessionIdGenerator":
			r.open(c, "SessionIdGenerator")
			r.note(c.pos, "the SessionIdGenerator is not used", "ids have 128 random bits or more", "")
		}
	}
}

// contextManager reads the manager of one context.
func (r *reader) contextManager(el *element, x *config.Context) {
	a := r.open(el, "Manager")
	switch class := a.class(); class {
	case "DeltaManager":
		x.Manager = &config.Component{Use: managerName, Pos: el.pos}
	case "BackupManager":
		x.Manager = &config.Component{Use: backupName, Pos: el.pos}
		x.Send = r.mapSendOptions(a.get("mapSendOptions"), a.posOf("mapSendOptions"), false, el.pos)
	case "StandardManager", "":
		if class == "StandardManager" || x.Distributable == nil {
			no := false
			x.Distributable = &no
		}
		r.note(el.pos, "sessions of this context stay on this node", "StandardManager does not replicate", "")
	default:
		m, ok := r.storeManager(class, a)
		if !ok {
			r.missingManager(class, el.pos, "the cluster's manager, or this node's memory if it has no cluster, takes its place")
			break
		}
		x.Manager = &m
		if x.Distributable == nil { // no <distributable/> is asked for
			yes := true
			x.Distributable = &yes
		}
		if r.stores.Line == 0 {
			r.stores = el.pos
		}
	}
	r.managerAttrs(a, x.Manager, x)
}

func (r *reader) channel(el *element, cl *config.Cluster) {
	a := r.open(el, "Channel")
	if class := a.class(); class != "GroupChannel" && class != "" {
		r.warn(a.posOf("className"), "the channel class "+cut(class)+" is not known: GroupChannel is meant", "", "")
	}
	a.ignore("name heartbeat heartbeatSleeptime optionCheck jmxEnabled jmxDomain jmxPrefix")
	a.done()
	interceptors := false
	for _, c := range el.children {
		switch r.child(el, c, "Membership Receiver Sender Interceptor ChannelListener MembershipListener") {
		case "Membership":
			r.membership(c, cl)
		case "Receiver":
			r.receiver(c, cl)
		case "Sender":
			r.sender(c, cl)
		case "Interceptor":
			interceptors = true
			r.interceptor(c, cl)
		case "ChannelListener", "MembershipListener":
			r.warn(c.pos, fmt.Sprintf("<%s> is left out", c.name), "listeners are Java code", "")
		}
	}
	if !interceptors {
		cl.Channel.Interceptors = r.defaultInterceptors(el.pos)
	}
	if cl.Channel.Interceptors == nil {
		cl.Channel.Interceptors = []config.Component{}
	}
}

// defaultInterceptors are Tomcat's.
func (r *reader) defaultInterceptors(pos config.Pos) []config.Component {
	return []config.Component{{Use: dispatchName, Pos: pos}, {Use: detectorName, Pos: pos}}
}

func (r *reader) membership(el *element, cl *config.Cluster) {
	a := r.open(el, "Membership")
	class := a.class()
	switch {
	case class == "McastService" || class == "":
		r.oldPackage(a, "org.apache.catalina.tribes.membership.McastService")
	case class == "CloudMembershipService":
		r.cloudMembership(a, el, cl)
		return
	case class == "StaticMembershipService":
		r.staticService(a, el, cl)
		return
	default:
		r.unavailable(el.pos, "the membership class "+cut(class), "the class is not known; with --lenient multicast takes its place", "")
		return
	}
	o := map[string]any{}
	if v := a.get("address", "mcastAddr"); v != "" {
		switch ip, err := netip.ParseAddr(v); {
		case err != nil || !ip.IsMulticast():
			r.fail(el.pos, fmt.Sprintf("the membership's address %q is not a multicast address", cut(v)), "write for example 228.0.0.4")
		case !ip.Is4():
			r.unavailable(el.pos, "the IPv6 multicast group "+v, "with --lenient the group is 228.0.0.4", "write an IPv4 group")
		default:
			o["group"] = v
		}
	}
	if n, ok := a.number(1, 65535, "port", "mcastPort"); ok {
		o["port"] = n
	}
	if v := a.get("bind", "mcastBindAddress"); v != "" {
		o["bind"] = v
	}
	frequency, hasFrequency := a.millis("frequency", "mcastFrequency")
	if hasFrequency && frequency > 0 {
		o["frequency"] = frequency
	}
	if d, ok := a.millis("dropTime", "mcastDropTime"); ok && d > 0 {
		o["drop_time"] = d
		if hasFrequency && d < 2*frequency {
			r.warn(a.posOf("dropTime"), fmt.Sprintf("dropTime %v is less than two heartbeats of %v", d, frequency), "one lost datagram makes a member look dead", "use at least three times the frequency")
		}
	}
	if n, ok := a.number(-1, 255, "ttl", "mcastTTL"); ok && n >= 0 {
		o["ttl"] = n
	}
	if v := a.get("domain", "mcastClusterDomain"); v != "" {
		cl.Channel.Domain = v
	}
	a.ignore("soTimeout mcastSoTimeout recoveryEnabled recoveryCounter recoverySleepTime localLoopbackDisabled debug")
	a.done()
	cl.Channel.Membership = config.NewComponent(membershipName, o, el.pos)
	for _, c := range el.children {
		r.warn(c.pos, fmt.Sprintf("<%s> in Membership is left out", cut(c.name)), "", "")
	}
}

// cloudMembership reads Tomcat's membership for Kubernetes and name servers. What
// the environment says is read at the start of the node, as Tomcat does.
func (r *reader) cloudMembership(a *attrs, el *element, cl *config.Cluster) {
	o := map[string]any{"tomcat": true} // nodes that send no heartbeats may be in the group
	provider := a.get("membershipProviderClassName")
	name := kubernetesName
	switch provider[strings.LastIndexByte(provider, '.')+1:] {
	case "", "kubernetes", "KubernetesMembershipProvider":
	case "dns", "DNSMembershipProvider":
		name = dnsName
	default:
		r.unavailable(a.posOf("membershipProviderClassName"), "the membership provider "+cut(provider),
			"the class is not known; with --lenient multicast takes its place", "use kubernetes or dns")
		return
	}
	timeout := func(attribute, option string, lo, hi time.Duration) {
		d, ok := a.millis(attribute)
		switch {
		case !ok:
		case d < lo || d > hi:
			r.warn(a.posOf(attribute), fmt.Sprintf("%s=%d is outside %v to %v: the default is used", attribute, d.Milliseconds(), lo, hi), "", "")
		default:
			o[option] = d
		}
	}
	if name == kubernetesName {
		timeout("connectTimeout", "connect_timeout", 10*time.Millisecond, time.Minute)
		timeout("readTimeout", "read_timeout", 10*time.Millisecond, time.Minute)
	} else {
		a.ignore("connectTimeout")
		timeout("readTimeout", "timeout", 10*time.Millisecond, time.Minute)
	}
	timeout("expirationTime", "drop_time", time.Second, time.Hour)
	a.done()
	r.note(el.pos, "nodes of Longhouse send heartbeats to UDP port 45565 of the addresses that are found",
		"so their death is seen without a look-up; Tomcat nodes are members while they are found and take connections", "let UDP port 45565 pass between the nodes")
	cl.Channel.Membership = config.NewComponent(name, o, el.pos)
	for _, c := range el.children {
		r.warn(c.pos, fmt.Sprintf("<%s> in Membership is left out", cut(c.name)), "", "")
	}
}

func (r *reader) receiver(el *element, cl *config.Cluster) {
	r.receiverSeen = true
	a := r.open(el, "Receiver")
	switch class := a.class(); class {
	case "NioReceiver", "BioReceiver", "":
	case "ReplicationListener", "SocketReplicationListener":
		r.oldPackage(a, "org.apache.catalina.tribes.transport.nio.NioReceiver")
	default:
		r.warn(a.posOf("className"), "the receiver class "+cut(class)+" is not known: NioReceiver is meant", "", "")
	}
	rc := &cl.Channel.Receiver
	addrNames := []string{"address", "host", "tcpListenAddress", "bind"}
	if v := a.get(addrNames...); v != "" {
		rc.Address = v
		if ip, err := netip.ParseAddr(v); err == nil && ip.IsLoopback() {
			pos := el.pos
			for _, n := range addrNames {
				if a.has(n) {
					pos = a.posOf(n)
				}
			}
			r.warn(pos, "the receiver announces "+v, "the address is also the one that other nodes connect to: the cluster works only among nodes on this machine", `write address="auto" or this machine's address`)
			r.at("cluster.channel.receiver.address")
		}
	}
	if n, ok := a.number(0, 65535, "port", "tcpListenPort"); ok {
		rc.Port = n
	}
	if n, ok := a.number(-1, 65535, "autoBind"); ok {
		rc.AutoBind = max(n, 1)
	}
	if n, ok := a.number(-1, 65535, "udpPort"); ok && n > 0 {
		rc.UDPPort = n
	}
	if n, ok := a.number(-1, 65535, "securePort"); ok && n > 0 {
		r.warn(a.posOf("securePort"), fmt.Sprintf("securePort=%d is not opened", n), "Tomcat announces it and opens nothing either", "encrypt the messages with the tls of the channel, or an EncryptInterceptor")
	}
	a.ignore("selectorTimeout tcpSelectorTimeout maxThreads minThreads tcpThreadCount direct maxIdleTime minTasks maxTasks rxBufSize txBufSize udpRxBufSize " +
		"udpTxBufSize tcpNoDelay ooBInline soReuseAddress soKeepAlive soLingerOn soLingerTime soTrafficClass timeout useBufferPool daemon sendAck " +
		"synchronized isSenderSynchronized compress debug")
	a.done()
}

// sender reads a Sender with its Transport. It returns the level that the 5.5
// attributes stand for, or "".
func (r *reader) sender(el *element, cl *config.Cluster) string {
	a := r.open(el, "Sender")
	if class := a.class(); class != "ReplicationTransmitter" && class != "" {
		r.warn(a.posOf("className"), "the sender class "+cut(class)+" is not known: ReplicationTransmitter is meant", "", "")
	}
	r.oldPackage(a, "org.apache.catalina.tribes.transport.ReplicationTransmitter")
	level := ""
	mode, ack := a.get("replicationMode"), a.boolean(true, "waitForAck")
	switch strings.ToLower(mode) {
	case "":
	case "pooled":
		level = "async"
		if ack {
			level = "ack"
		}
	case "synchronous":
		level = "sync"
	case "asynchronous", "fastasyncqueue", "fastasync":
		level = "async"
	default:
		r.warn(a.posOf("replicationMode"), fmt.Sprintf("replicationMode=%q is not known: asynchronous is taken", cut(mode)), "", "known are pooled, synchronous, asynchronous, fastasyncqueue")
	}
	if level != "" {
		words := map[string]string{"async": "a request does not wait", "ack": "a request waits until every other node has received its changes",
			"sync": "a request waits until every other node has applied its changes"}[level]
		r.note(a.posOf("replicationMode"), fmt.Sprintf("replicationMode=%s with waitForAck=%t means: %s; here send: %s", mode, ack, words, level), "replicationMode is of Tomcat 5.5; later versions have channelSendOptions", "")
	}
	if d, ok := a.millis("ackTimeout"); ok && d > 0 {
		cl.Channel.Sender.AckTimeout = d
	}
	a.ignore("autoConnect compress processSenderFrequency doProcessingStats doTransmitterProcessingStats doWaitAckStats resend recoverTimeout recoverCounter " +
		"keepAliveTimeout keepAliveMaxRequestCount maxPoolSocketLimit maxQueueLength queueCheckLock queueDoStats queueTimeWait queueAddWaitTimeout " +
		"queueRemoveWaitTimeout threadPriority doPushEnabled suspectTimeout debug")
	a.done()
	for _, c := range el.children {
		if r.child(el, c, "Transport") != "" {
			r.transport(c, cl)
		}
	}
	return level
}

func (r *reader) transport(el *element, cl *config.Cluster) {
	a := r.open(el, "Transport")
	s := &cl.Channel.Sender
	if d, ok := a.millis("timeout"); ok && d > 0 {
		s.AckTimeout = d
	}
	if n, ok := a.number(0, 100, "maxRetryAttempts"); ok {
		s.Retries = &n
	}
	if n, ok := a.number(1, 1000, "poolSize"); ok {
		s.Pool = n
	}
	if !a.boolean(true, "throwOnFailedAck") {
		r.warn(a.posOf("throwOnFailedAck"), "throwOnFailedAck=false is not done", "a negative acknowledgement is a failure", "remove it")
	}
	a.ignore("maxWait keepAliveCount keepAliveTime rxBufSize txBufSize udpRxBufSize udpTxBufSize directBuffer tcpNoDelay ooBInline soReuseAddress soKeepAlive " +
		"soLingerOn soLingerTime soTrafficClass maxSenders")
	a.done()
}

func (r *reader) clusterListener(el *element) {
	a := r.open(el, "ClusterListener")
	switch class := a.class(); class {
	case "ClusterSessionListener":
	case "JvmRouteSessionIDBinderListener":
		r.note(el.pos, "JvmRouteSessionIDBinderListener is not needed", "nodes learn new session ids by themselves; Tomcat removed the class in version 8", "remove it")
	default:
		r.warn(el.pos, fmt.Sprintf("the cluster listener %s is left out", cut(class)), "listeners are Java code", "")
	}
}

func (r *reader) deployer(el *element, host string) {
	a := r.open(el, "Deployer")
	class := a.class()
	if class != "FarmWarDeployer" {
		r.unavailable(el.pos, "the deployer class "+cut(class), "the class is not known", "")
		return
	}
	why := "applications are not sent to the other nodes"
	if host == "" {
		why += "; Tomcat's works only in the Cluster of a Host"
	}
	fix := "deploy to every node, for example with the deployer watch"
	if !a.boolean(false, "watchEnabled") {
		fix = "remove it; with watchEnabled=false this node would only receive applications"
	}
	r.unavailable(el.pos, "the FarmWarDeployer", why, fix)
}

// defaultValves adds Tomcat's valves if the Cluster has none of its own.
func (r *reader) defaultValves(el *element) {
	if r.clusterValves == nil {
		r.clusterValves = []config.Component{{Use: binderName, Pos: el.pos}, {Use: replicationName, Pos: el.pos}}
		return
	}
	has := map[string]bool{}
	for _, v := range r.clusterValves {
		has[v.Use] = true
	}
	if !has[binderName] {
		r.warn(el.pos, "the Cluster has valves, but no JvmRouteBinderValve", "as soon as one Valve is written the default valves vanish: after a node's death cookies keep the dead route, and users are sent back to it when it returns",
			`add <Valve className="org.apache.catalina.ha.session.JvmRouteBinderValve"/>`)
		r.at("engine.valves")
	}
	if !has[replicationName] {
		r.warn(el.pos, "the Cluster has valves, but no ReplicationValve", "as soon as one Valve is written the default valves vanish: sessions are not replicated",
			`add <Valve className="org.apache.catalina.ha.tcp.ReplicationValve"/>`)
		r.at("engine.valves")
	}
}

// appendValve reads a Valve.
func (r *reader) appendValve(list []config.Component, el *element) []config.Component {
	a := r.open(el, "Valve")
	class := a.class()
	o := map[string]any{}
	use := ""
	switch class {
	case "ReplicationValve":
		use = replicationName
		r.oldPackage(a, "org.apache.catalina.ha.tcp.ReplicationValve")
		r.filter(a, o)
		a.ignore("primaryIndicator primaryIndicatorName statistics debug")
	case "JvmRouteBinderValve":
		use = binderName
		if !a.boolean(true, "enabled") {
			r.note(el.pos, "the JvmRouteBinderValve is switched off", "", "")
			return list
		}
		a.ignore("sessionIdAttribute")
	case "ClusterSingleSignOn", "SingleSignOn":
		use = signOnName
		r.singleSignOn(a, o)
	case "PersistentValve":
		use = persistentName
		if text := a.get("filter"); text != "" && r.pattern(text, a.posOf("filter")) {
			o["filter"] = text
		}
		if !a.boolean(true, "semaphoreBlockOnAcquire") {
			o["wait"] = "0s"
		}
		a.ignore("semaphoreFairness semaphoreAcquireUninterruptibly asyncSupported")
		r.note(a.el.pos, "PersistentValve: a request reads its session from the store first, and requests of one session work one after the other on a node",
			"it is of use only for nodes that share a store and are in no group with each other", "")
	default:
		use = r.otherValve(class, a, o)
	}
	if use == "" {
		return list
	}
	a.done()
	return append(list, config.NewComponent(use, o, el.pos))
}

// singleSignOn reads the valve of either name: here it is the same one.
func (r *reader) singleSignOn(a *attrs, o map[string]any) {
	if v := a.get("cookieName"); v != "" {
		o["cookie"] = v
	}
	if v := a.get("cookieDomain"); v != "" {
		o["cookie_domain"] = v
	}
	if a.boolean(false, "requireReauthentication") {
		o["require_reauthentication"] = true
		r.note(a.posOf("requireReauthentication"), "requireReauthentication: each application signs the user on itself; they sign off together",
			"Tomcat would log in again with the password that it keeps; here nobody keeps one", "")
	}
	a.unused("mapSendOptions rpcTimeout accessTimeout terminateOnStartFailure", "sign-ons are kept and sent as sessions are, by the cluster's manager")
	a.ignore("asyncSupported")
	r.note(a.el.pos, "single sign-on: applications say who the user is by the package valves/singlesignon",
		"Tomcat's authenticators do not run here; sign-ons are not shared with Tomcat nodes, which send the users' passwords in them", "")
}

// suffix matches a part of a filter that means the end of a file name.
var suffix = regexp.MustCompile(`^\.\*\\\.([A-Za-z0-9_-]+)$`)

// filter reads the filter of either era into the valve's options.
func (r *reader) filter(a *attrs, o map[string]any) {
	text := a.get("filter")
	if text == "" {
		return
	}
	pos := a.posOf("filter")
	if !strings.Contains(text, ";") {
		if r.pattern(text, pos) {
			o["filter"] = text
		}
		return
	}
	r.warn(pos, "the filter is a list joined by semicolons, the form of Tomcat 5.5 and 6; it is read as a list of patterns",
		"since Tomcat 7 it is one pattern, in which this form matches nothing", "join the patterns by | instead")
	var files, others []string
	for part := range strings.SplitSeq(text, ";") {
		part = strings.TrimSpace(part)
		if m := suffix.FindStringSubmatch(part); m != nil {
			files = append(files, "*."+m[1])
		} else if part != "" && r.pattern(part, pos) {
			others = append(others, "(?:"+part+")")
		}
	}
	if len(files) > 0 {
		o["patterns"] = files
	}
	if len(others) > 0 {
		o["filter"] = strings.Join(others, "|")
	}
}

// pattern reports whether Go can read a pattern of Java.
func (r *reader) pattern(p string, pos config.Pos) bool {
	_, err := regexp.Compile(p)
	if err != nil {
		r.warn(pos, fmt.Sprintf("the pattern %q is left out: %v", cut(p), err), "Go's regular expressions know no look-around and no back references", "write it without them")
	}
	return err == nil
}

// otherValve reads a Valve that has nothing to do with the cluster; it returns
// the name of ours, or "".
func (r *reader) otherValve(class string, a *attrs, o map[string]any) string {
	switch class {
	case "AccessLogValve", "FastCommonAccessLogValve":
		r.accessLog(a, o)
		return "accesslog"
	case "RemoteIpValve":
		if v := a.get("remoteIpHeader"); v != "" {
			o["for_header"] = v
		}
		if v := a.get("protocolHeader"); v != "" {
			o["proto_header"] = v
		}
		for _, n := range []string{"internalProxies", "trustedProxies"} {
			if a.get(n) != "" {
				r.warn(a.posOf(n), n+" is not read: loopback, link-local and private addresses are trusted", "it is a pattern for addresses; here proxies are networks", "set the option trusted of the valve remoteip in YAML")
			}
		}
		a.ignore("proxiesHeader requestAttributesEnabled protocolHeaderHttpsValue httpServerPort httpsServerPort hostHeader portHeader changeLocalPort changeLocalName asyncSupported")
		return "remoteip"
	case "ErrorReportValve":
		a.ignore("showReport showServerInfo asyncSupported")
		a.unused("errorCode.0 errorCode.404 errorCode.500 exceptionType.java.lang.Throwable", "pages of your own are a matter of the application")
		return "errorreport"
	case "HealthCheckValve":
		if v := a.get("path"); v != "" {
			o["path"] = v
		}
		a.ignore("checkContainersAvailable")
		return "health"
	case "":
		r.fail(a.el.pos, "the Valve has no className", "add it, or remove the element")
		return ""
	}
	why, fix := whyMissing(class, missingValves, "remove it, or write it as a valve in Go",
		"AccessLogValve", "RemoteIpValve", "ErrorReportValve", "HealthCheckValve", "ReplicationValve", "JvmRouteBinderValve", "ClusterSingleSignOn", "SingleSignOn")
	r.unavailable(a.el.pos, "the valve "+cut(class), why, fix)
	return ""
}

func (r *reader) accessLog(a *attrs, o map[string]any) {
	switch pattern := a.get("pattern"); pattern {
	case "", "common", `%h %l %u %t "%r" %s %b`:
		o["format"] = "common"
	case "combined", `%h %l %u %t "%r" %s %b "%{Referer}i" "%{User-Agent}i"`:
		o["format"] = "combined"
	default:
		o["format"] = "combined"
		r.warn(a.posOf("pattern"), "the access log's pattern is not done: the format is combined", "known are common, combined and json", "")
	}
	dir, prefix, end := a.get("directory"), a.get("prefix"), a.get("suffix")
	if dir == "" {
		dir = "logs"
	}
	if prefix == "" {
		prefix = "access_log"
	}
	if dir = r.resolve(r.base, dir); isDir(dir) && !strings.ContainsAny(prefix+end, `/\`) {
		o["file"] = filepath.Join(dir, strings.TrimSuffix(prefix, ".")+end)
	} else {
		o["file"] = "stderr"
		r.note(a.el.pos, fmt.Sprintf("the directory %s does not exist: the access log goes to the standard error output", dir), "", "")
	}
	a.ignore("resolveHosts rotatable buffered fileDateFormat locale encoding condition conditionUnless conditionIf requestAttributesEnabled renameOnRotate " +
		"maxDays checkExists ipv6Canonical maxLogMessageBufferSize asyncSupported enabled debug")
}
