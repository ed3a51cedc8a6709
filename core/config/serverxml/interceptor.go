package serverxml

import (
	"fmt"
	"strings"
	"time"

	"github.com/longhouse-go/longhouse/core/config"
)

// interceptor reads an Interceptor of a Channel.
func (r *reader) interceptor(el *element, cl *config.Cluster) {
	a := r.open(el, "Interceptor")
	o := map[string]any{}
	use := r.interceptorOptions(el, a, o)
	if use == "" {
		return
	}
	flag := use == "gzip" || use == "fragment" || use == "order" || use == "twophase"
	if n, ok := a.number(0, 1<<30, "optionFlag"); ok && flag {
		o["option_flag"] = n
	}
	a.done()
	for _, c := range el.children {
		if use != "staticmember" || c.name != "Member" && c.name != "LocalMember" {
			r.warn(c.pos, fmt.Sprintf("<%s> in Interceptor is left out", cut(c.name)), "", "")
		}
	}
	cl.Channel.Interceptors = append(cl.Channel.Interceptors, config.NewComponent(use, o, el.pos))
}

// interceptorOptions reads the attributes of an interceptor into our options
// and returns its name here, "" if there is none.
func (r *reader) interceptorOptions(el *element, a *attrs, o map[string]any) string {
	duration := func(attr, option string) {
		if d, ok := a.millis(attr); ok && d > 0 {
			o[option] = d
		}
	}
	number := func(attr, option string) {
		if n, ok := a.number(0, 1<<30, attr); ok {
			o[option] = n
		}
	}
	switch class := a.class(); class {
	case "TcpFailureDetector":
		duration("connectTimeout", "connect_timeout")
		duration("readTestTimeout", "read_timeout")
		if a.has("performSendTest") {
			o["probe"] = a.boolean(true, "performSendTest")
		}
		if a.boolean(false, "performReadTest") {
			o["read_test"] = "always"
		}
		a.ignore("removeSuspectsTimeout optionFlag")
		return detectorName
	case "MessageDispatchInterceptor", "MessageDispatch15Interceptor":
		if class == "MessageDispatch15Interceptor" {
			r.note(el.pos, "MessageDispatch15Interceptor is read as MessageDispatchInterceptor", "Tomcat 8.5 merged them; later versions do not start with the old name", "")
		}
		if n, ok := a.number(1, 1<<30, "maxQueueSize"); ok {
			o["queue_bytes"] = config.Bytes(n)
		}
		if a.has("alwaysSend") {
			if a.boolean(true, "alwaysSend") {
				o["on_full"] = "block"
			} else {
				o["on_full"] = "fail"
			}
		}
		a.ignore("maxThreads maxSpareThreads keepAliveTime useDeepClone optionFlag")
		return dispatchName
	case "ThroughputInterceptor":
		number("interval", "interval")
		a.ignore("optionFlag")
		return throughputName
	case "TcpPingInterceptor":
		duration("interval", "interval")
		if a.has("staticOnly") {
			o["static_only"] = a.boolean(false, "staticOnly")
		}
		a.ignore("useThread optionFlag")
		return "ping"
	case "StaticMembershipInterceptor":
		r.staticMembers(el, o)
		a.ignore("optionFlag")
		return "staticmember"
	case "DomainFilterInterceptor":
		if v := a.get("domain"); v != "" {
			o["domain"] = v
		}
		number("logInterval", "log_interval")
		a.ignore("optionFlag")
		return "domain"
	case "FragmentationInterceptor":
		if n, ok := a.number(1, 1<<30, "maxSize"); ok {
			o["max_size"] = n
		}
		duration("expire", "expire")
		return "fragment"
	case "GzipInterceptor":
		number("compressionMinSize", "min_size")
		if n, ok := a.number(0, 1<<30, "interval"); ok && a.boolean(false, "statsEnabled") {
			o["stats_interval"] = n
		}
		a.ignore("statsEnabled")
		return "gzip"
	case "OrderInterceptor":
		duration("expire", "expire")
		if a.has("forwardExpired") {
			o["forward_expired"] = a.boolean(true, "forwardExpired")
		}
		if n, ok := a.number(1, 1<<31-1, "maxQueue"); ok && n <= 1<<20 { // larger ones mean: no bound
			o["max_queue"] = n
		}
		return "order"
	case "TwoPhaseCommitInterceptor":
		duration("expire", "expire")
		a.ignore("deepclone")
		return "twophase"
	case "EncryptInterceptor":
		r.encryption(el, a, o)
		return "encrypt"
	case "NonBlockingCoordinator":
		a.ignore("optionFlag")
		return "coordinator"
	case "SimpleCoordinator":
		r.note(el.pos, "SimpleCoordinator is read as NonBlockingCoordinator", "it sends no messages, and so finds no agreement; among Tomcat nodes with SimpleCoordinator the election of this node stays without answers", "use NonBlockingCoordinator on all nodes")
		a.ignore("optionFlag")
		return "coordinator"
	case "":
		r.fail(el.pos, "the Interceptor has no className", "add it, or remove the element")
	default:
		why, fix := whyMissing(class, nil, "remove it, or write it as a plugin", "TcpFailureDetector", "MessageDispatchInterceptor", "ThroughputInterceptor",
			"TcpPingInterceptor", "StaticMembershipInterceptor", "DomainFilterInterceptor", "FragmentationInterceptor", "GzipInterceptor", "OrderInterceptor",
			"TwoPhaseCommitInterceptor", "EncryptInterceptor", "NonBlockingCoordinator")
		r.unavailable(el.pos, "the interceptor "+cut(class), why, fix)
	}
	return ""
}

// encryption reads an EncryptInterceptor.
func (r *reader) encryption(el *element, a *attrs, o map[string]any) {
	o["dialect"] = "tomcat-10.1.58"
	if v := a.get("encryptionAlgorithm"); v != "" {
		o["algorithm"] = v
	}
	if v := a.get("encryptionKey"); v != "" {
		o["key"] = v
	} else {
		r.fail(el.pos, "the EncryptInterceptor has no encryptionKey", "write the key that the other nodes have")
	}
	if d, ok := a.millis("replayWindowTime"); ok && d > 0 {
		o["replay_time"] = d
	}
	if n, ok := a.number(1, 1<<30, "replayWindowMessageCount"); ok {
		o["replay_messages"] = n
	}
	r.note(el.pos, "messages are encrypted as Tomcat 10.1.58 and later do it", "a server.xml does not say of which Tomcat it is, and the form has changed twice",
		"among older nodes set dialect: tomcat-10.1.56 (10.1.56 and 57) or tomcat-10.1.55 (before); among Longhouse nodes only, longhouse")
	a.ignore("providerName optionFlag")
}

// staticMembers reads the members of a StaticMembershipInterceptor or a
// StaticMembershipService.
func (r *reader) staticMembers(el *element, o map[string]any) {
	var members []any
	for _, c := range el.children {
		if r.child(el, c, "Member LocalMember") == "" {
			continue
		}
		a := r.open(c, c.name)
		if class := a.class(); class != "StaticMember" && class != "" {
			r.warn(a.posOf("className"), "the member class "+cut(class)+" is not known: StaticMember is meant", "", "")
		}
		m := map[string]any{}
		for attr, option := range map[string]string{"host": "host", "domain": "domain", "uniqueId": "unique_id", "payload": "payload"} {
			if v := a.get(attr); v != "" {
				m[option] = v
			}
		}
		for attr, option := range map[string]string{"port": "port", "securePort": "secure_port", "udpPort": "udp_port"} {
			if n, ok := a.number(-1, 65535, attr); ok && n > 0 {
				m[option] = n
			}
		}
		a.done()
		if strings.EqualFold(c.name, "LocalMember") {
			for _, option := range []string{"secure_port", "udp_port", "payload"} {
				delete(m, option)
			}
			if d, ok := m["domain"].(string); ok {
				delete(m, "domain")
				if r.cfg.Cluster.Channel.Domain == "" {
					r.cfg.Cluster.Channel.Domain = d
				}
			}
			o["local"] = m
			continue
		}
		if m["host"] == nil || m["port"] == nil {
			r.fail(c.pos, "a Member needs a host and a port", "add them")
			continue
		}
		members = append(members, m)
	}
	if members != nil {
		o["members"] = members
	}
}

// staticService reads a StaticMembershipService.
func (r *reader) staticService(a *attrs, el *element, cl *config.Cluster) {
	o := map[string]any{}
	r.staticMembers(el, o)
	members, _ := o["members"].([]any)
	for _, m := range members {
		m := m.(map[string]any)
		for k := range m {
			if k != "host" && k != "port" {
				delete(m, k)
			}
		}
	}
	delete(o, "local")
	if len(members) == 0 {
		r.fail(el.pos, "the StaticMembershipService has no Member", `add <Member className="org.apache.catalina.tribes.membership.StaticMember" host="…" port="4000"/> for each node`)
	}
	name := r.cluster.attr("clusterName")
	if name == "" {
		if name = r.cfg.Engine.Name; r.clusterHost != "" {
			name = r.clusterHost
		}
	}
	o["channel"] = name + "-Channel" // as Tomcat calls it
	for attr, option := range map[string]string{"expirationTime": "expiration", "connectTimeout": "timeout", "rpcTimeout": "timeout", "pingInterval": "ping_interval"} {
		if d, ok := a.millis(attr); ok && d > 0 {
			if have, ok := o[option].(time.Duration); !ok || d > have {
				o[option] = d
			}
		}
	}
	a.ignore("useThread")
	a.done()
	r.note(el.pos, "Tomcat nodes of the group need a uniqueId in their LocalMember", "by default all of them have the same one, and cannot be told apart", "")
	cl.Channel.Membership = config.NewComponent("staticservice", o, el.pos)
}
