import java.io.Serializable;
import java.net.InetAddress;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.catalina.tribes.ByteMessage;
import org.apache.catalina.tribes.Channel;
import org.apache.catalina.tribes.ChannelException;
import org.apache.catalina.tribes.ChannelInterceptor;
import org.apache.catalina.tribes.ChannelListener;
import org.apache.catalina.tribes.ErrorHandler;
import org.apache.catalina.tribes.Member;
import org.apache.catalina.tribes.MembershipListener;
import org.apache.catalina.tribes.UniqueId;
import org.apache.catalina.tribes.group.GroupChannel;
import org.apache.catalina.tribes.group.Response;
import org.apache.catalina.tribes.group.RpcCallback;
import org.apache.catalina.tribes.group.RpcChannel;
import org.apache.catalina.tribes.group.interceptors.DomainFilterInterceptor;
import org.apache.catalina.tribes.group.interceptors.EncryptInterceptor;
import org.apache.catalina.tribes.group.interceptors.FragmentationInterceptor;
import org.apache.catalina.tribes.group.interceptors.GzipInterceptor;
import org.apache.catalina.tribes.group.interceptors.MessageDispatchInterceptor;
import org.apache.catalina.tribes.group.interceptors.NonBlockingCoordinator;
import org.apache.catalina.tribes.group.interceptors.OrderInterceptor;
import org.apache.catalina.tribes.group.interceptors.StaticMembershipInterceptor;
import org.apache.catalina.tribes.group.interceptors.TcpFailureDetector;
import org.apache.catalina.tribes.group.interceptors.TcpPingInterceptor;
import org.apache.catalina.tribes.group.interceptors.ThroughputInterceptor;
import org.apache.catalina.tribes.group.interceptors.TwoPhaseCommitInterceptor;
import org.apache.catalina.tribes.membership.McastService;
import org.apache.catalina.tribes.membership.StaticMember;
import org.apache.catalina.tribes.membership.StaticMembershipService;
import org.apache.catalina.tribes.tipis.AbstractReplicatedMap;
import org.apache.catalina.tribes.tipis.LazyReplicatedMap;
import org.apache.catalina.tribes.tipis.ReplicatedMap;
import org.apache.catalina.tribes.transport.MultiPointSender;
import org.apache.catalina.tribes.transport.ReplicationTransmitter;
import org.apache.catalina.tribes.transport.nio.NioReceiver;

/** One Tribes node, as the arguments of "open" describe it, and what can be done with it. */
final class Node {
    /** Bodies up to this size are told in full, of larger ones length and digest. */
    private static final int SHOWN = 2048;

    private final String name;
    private final Map<String, String> conf;
    private final GroupChannel channel = new GroupChannel();
    private final int level;
    private final Map<String, RpcChannel> rpcs = new ConcurrentHashMap<>();
    private final Map<String, AbstractReplicatedMap<Object, Object>> maps = new ConcurrentHashMap<>();
    private NonBlockingCoordinator coordinator;
    private TcpFailureDetector detector;
    private volatile String failOn;

    Node(String name, Map<String, String> conf) throws Exception {
        this.name = name;
        this.conf = conf;
        level = Integer.parseInt(c("level", String.valueOf(Channel.DEFAULT)));
        failOn = c("failOn", "");
        channel.setName(c("channel", "peers"));
        channel.setJmxEnabled(false);
        channel.setOptionCheck(Boolean.parseBoolean(c("optionCheck", "false")));
        channel.setHeartbeatSleeptime(Long.parseLong(c("heartbeat", "1000")));
        NioReceiver r = (NioReceiver) channel.getChannelReceiver();
        r.setAddress(c("host", "127.0.0.1"));
        r.setPort(Integer.parseInt(c("port", "0")));
        r.setAutoBind(1);
        r.setUdpPort(Integer.parseInt(c("udp", "-1")));
        r.setSecurePort(Integer.parseInt(c("secure", "-1")));
        MultiPointSender s = ((ReplicationTransmitter) channel.getChannelSender()).getTransport();
        s.setTimeout(Long.parseLong(c("timeout", "15000")));
        s.setMaxRetryAttempts(Integer.parseInt(c("retry", "1")));
        s.setKeepAliveCount(Integer.parseInt(c("keepAliveCount", "-1")));
        membership();
        for (String x : c("stack", "").split(",")) {
            if (!x.isEmpty()) {
                channel.addInterceptor(layer(x.split(":")));
            }
        }
        listen();
    }

    private String c(String key, String otherwise) {
        return conf.getOrDefault(key, otherwise);
    }

    private void membership() throws Exception {
        switch (c("membership", "multicast")) {
            case "multicast":
                McastService m = new McastService();
                m.setAddress(c("group", ""));
                m.setPort(Integer.parseInt(c("groupPort", "0")));
                m.setBind(c("bind", "127.0.0.1"));
                m.setFrequency(Long.parseLong(c("frequency", "500")));
                m.setDropTime(Long.parseLong(c("dropTime", "3000")));
                if (conf.containsKey("domain")) {
                    m.setDomain(c("domain", ""));
                }
                if (conf.containsKey("payload")) {
                    m.setPayload(Values.unhex(c("payload", "")));
                }
                channel.setMembershipService(m);
                break;
            case "static":
                StaticMembershipService s = new StaticMembershipService();
                for (String x : c("members", "").split(",")) {
                    s.addStaticMember(member(x));
                }
                s.setUseThread(true);
                s.setPingInterval(Long.parseLong(c("frequency", "500")));
                s.setExpirationTime(Long.parseLong(c("dropTime", "5000")));
                s.setRpcTimeout(Long.parseLong(c("timeout", "15000")));
                s.setConnectTimeout(Integer.parseInt(c("connectTimeout", "2000")));
                channel.setMembershipService(s);
                break;
            case "none": // members come from an interceptor, if at all
                break;
            default:
                throw new IllegalArgumentException("membership " + c("membership", ""));
        }
    }

    /** A configured member: host/port/id in hexadecimal/domain/udp port, from the id on all optional. */
    private static StaticMember member(String s) throws Exception {
        String[] p = s.split("/", -1);
        StaticMember m = new StaticMember(p[0], Integer.parseInt(p[1]), 0);
        if (p.length > 2 && !p[2].isEmpty()) {
            m.setUniqueId(Values.unhex(p[2]));
        }
        if (p.length > 3 && !p[3].isEmpty()) {
            m.setDomain(p[3]);
        }
        if (p.length > 4 && !p[4].isEmpty()) {
            m.setUdpPort(Integer.parseInt(p[4]));
        }
        return m;
    }

    /** One interceptor: its name, then option=value, all separated by colons. */
    private ChannelInterceptor layer(String[] p) throws Exception {
        Map<String, String> o = new LinkedHashMap<>();
        for (int i = 1; i < p.length; i++) {
            int eq = p[i].indexOf('=');
            o.put(p[i].substring(0, eq), p[i].substring(eq + 1));
        }
        ChannelInterceptor l;
        switch (p[0]) {
            case "dispatch":
                l = new MessageDispatchInterceptor();
                break;
            case "throughput":
                l = new ThroughputInterceptor();
                break;
            case "detector":
                detector = new TcpFailureDetector();
                detector.setPerformReadTest(Boolean.parseBoolean(o.getOrDefault("read", "false")));
                detector.setConnectTimeout(Long.parseLong(o.getOrDefault("connect", "5000")));
                detector.setReadTestTimeout(10000);
                l = detector;
                break;
            case "gzip":
                GzipInterceptor g = new GzipInterceptor();
                g.setCompressionMinSize(Integer.parseInt(o.getOrDefault("min", "0")));
                l = g;
                break;
            case "fragment":
                FragmentationInterceptor f = new FragmentationInterceptor();
                f.setMaxSize(Integer.parseInt(o.getOrDefault("max", "102400")));
                l = f;
                break;
            case "order":
                OrderInterceptor ord = new OrderInterceptor();
                ord.setExpire(Long.parseLong(o.getOrDefault("expire", "3000")));
                l = ord;
                break;
            case "twophase":
                l = new TwoPhaseCommitInterceptor();
                break;
            case "encrypt":
                EncryptInterceptor e = new EncryptInterceptor();
                if (o.containsKey("algorithm")) {
                    e.setEncryptionAlgorithm(o.get("algorithm"));
                }
                e.setEncryptionKey(o.get("key"));
                l = e;
                break;
            case "ping":
                TcpPingInterceptor t = new TcpPingInterceptor();
                t.setInterval(Long.parseLong(o.getOrDefault("interval", "200")));
                t.setUseThread(true);
                l = t;
                break;
            case "coordinator":
                coordinator = new NonBlockingCoordinator();
                l = coordinator;
                break;
            case "domain":
                DomainFilterInterceptor d = new DomainFilterInterceptor();
                d.setDomain(o.getOrDefault("domain", ""));
                l = d;
                break;
            case "staticmember":
                StaticMembershipInterceptor sm = new StaticMembershipInterceptor();
                for (String x : c("members", "").split(",")) {
                    if (!x.isEmpty()) {
                        sm.addStaticMember(member(x));
                    }
                }
                if (conf.containsKey("local")) {
                    StaticMember local = member(c("local", ""));
                    local.setLocal(true);
                    sm.setLocalMember(local);
                }
                l = sm;
                break;
            default:
                throw new IllegalArgumentException("interceptor " + p[0]);
        }
        if (o.containsKey("flag")) {
            l.setOptionFlag(Integer.decode(o.get("flag")));
        }
        return l;
    }

    private void listen() {
        channel.addMembershipListener(new MembershipListener() {
            @Override
            public void memberAdded(Member m) {
                Peer.event("added", "node", name, "member", show(m));
            }

            @Override
            public void memberDisappeared(Member m) {
                Peer.event("gone", "node", name, "member", show(m));
            }
        });
        channel.addChannelListener(new ChannelListener() {
            @Override
            public void messageReceived(Serializable msg, Member from) {
                byte[] b = msg instanceof ByteMessage ? ((ByteMessage) msg).getMessage() : null;
                if (b == null || b.length <= SHOWN) {
                    Peer.event("message", "node", name, "from", Values.hex(from.getUniqueId()), "value",
                            Values.write(msg), "samples", b == null ? Samples.names(msg) : "");
                } else {
                    Peer.event("message", "node", name, "from", Values.hex(from.getUniqueId()), "size",
                            String.valueOf(b.length), "digest", digest(b));
                }
                if (!failOn.isEmpty() && b != null && starts(b, Values.latin(failOn))) {
                    throw new IllegalStateException("the listener fails as the test wants it");
                }
            }

            @Override
            public boolean accept(Serializable msg, Member from) {
                String c = msg == null ? "" : msg.getClass().getName();
                return !c.startsWith("org.apache.catalina.tribes.") || msg instanceof ByteMessage;
            }
        });
    }

    private static boolean starts(byte[] b, byte[] with) {
        return b.length >= with.length && Arrays.equals(Arrays.copyOf(b, with.length), with);
    }

    static String digest(byte[] b) {
        try {
            return Values.hex(MessageDigest.getInstance("SHA-256").digest(b));
        } catch (Exception e) {
            throw new IllegalStateException(e);
        }
    }

    private static String show(Member m) {
        Map<String, String> v = new LinkedHashMap<>();
        v.put("id", Values.hex(m.getUniqueId()));
        try {
            v.put("host", InetAddress.getByAddress(m.getHost()).getHostAddress());
        } catch (Exception e) {
            v.put("host", Values.hex(m.getHost()));
        }
        v.put("port", String.valueOf(m.getPort()));
        v.put("udp", String.valueOf(m.getUdpPort()));
        v.put("secure", String.valueOf(m.getSecurePort()));
        v.put("alive", String.valueOf(m.getMemberAliveTime()));
        v.put("domain", new String(m.getDomain(), java.nio.charset.StandardCharsets.ISO_8859_1));
        v.put("command", new String(m.getCommand(), java.nio.charset.StandardCharsets.ISO_8859_1));
        v.put("payload", Values.hex(m.getPayload()));
        return Peer.encode(v);
    }

    private static Map<String, String> result(String... kv) {
        Map<String, String> m = new LinkedHashMap<>();
        for (int i = 0; i < kv.length; i += 2) {
            m.put(kv[i], kv[i + 1] == null ? "" : kv[i + 1]);
        }
        return m;
    }

    /** Adds the faulty members of a failed send, by id and reason. */
    static void faults(Throwable e, Map<String, String> r) {
        if (!(e instanceof ChannelException)) {
            return;
        }
        StringBuilder b = new StringBuilder();
        for (ChannelException.FaultyMember f : ((ChannelException) e).getFaultyMembers()) {
            Throwable c = f.getCause();
            b.append(b.length() == 0 ? "" : ",").append(Values.hex(f.getMember().getUniqueId())).append('/').append(
                    c == null ? "" : c.getClass().getSimpleName());
        }
        r.put("faults", b.toString());
    }

    Map<String, String> start() throws Exception {
        channel.start(level);
        return result("local", show(channel.getLocalMember(true)));
    }

    Map<String, String> stop() throws Exception {
        for (AbstractReplicatedMap<Object, Object> m : maps.values()) {
            m.breakdown();
        }
        for (RpcChannel r : rpcs.values()) {
            r.breakdown();
        }
        channel.stop(level);
        return result();
    }

    private Member[] to(Map<String, String> a) {
        Member[] all = channel.getMembers();
        if (!a.containsKey("to")) {
            return all;
        }
        List<Member> l = new ArrayList<>();
        for (String id : a.get("to").split(",")) {
            boolean found = false;
            for (Member m : all) {
                if (Values.hex(m.getUniqueId()).equals(id)) {
                    l.add(m);
                    found = true;
                }
            }
            if (!found) {
                throw new IllegalArgumentException("no member " + id);
            }
        }
        return l.toArray(new Member[0]);
    }

    Map<String, String> run(String verb, Map<String, String> a) throws Exception {
        switch (verb) {
            case "members": {
                StringBuilder b = new StringBuilder();
                for (Member m : channel.getMembers()) {
                    b.append(b.length() == 0 ? "" : ",").append(show(m));
                }
                return result("members", b.toString());
            }
            case "start":
                channel.start(Integer.parseInt(a.get("level")));
                return result();
            case "stop":
                channel.stop(Integer.parseInt(a.get("level")));
                return result();
            case "failOn":
                failOn = a.get("prefix");
                return result();
            case "send":
                return send(a);
            case "samples":
                return result("names", String.join(",", Samples.all().keySet()));
            case "sample":
                channel.send(to(a), Samples.all().get(a.get("name")), Integer.decode(a.get("options")));
                return result();
            case "payload":
                channel.getMembershipService().setPayload(Values.unhex(a.get("payload")));
                return result();
            case "setDomain":
                channel.getMembershipService().setDomain(Values.latin(a.get("domain")));
                return result();
            case "heartbeat":
                channel.heartbeat();
                return result();
            case "check":
                detector.checkMembers(true);
                return result();
            case "election": {
                Member c = coordinator.getCoordinator();
                StringBuilder b = new StringBuilder();
                for (Member m : coordinator.getView()) {
                    b.append(b.length() == 0 ? "" : ",").append(Values.hex(m.getUniqueId()));
                }
                UniqueId id = coordinator.getViewId();
                return result("coordinator", c == null ? "" : Values.hex(c.getUniqueId()), "view", b.toString(), "id",
                        id == null ? "" : Values.hex(id.getBytes()));
            }
            case "rpcOpen":
                return rpcOpen(a);
            case "rpc":
                return rpc(a);
            case "mapOpen":
                return mapOpen(a);
            default:
                if (a.containsKey("map")) {
                    return map(verb, maps.get(a.get("map")), a);
                }
                throw new IllegalArgumentException("no verb " + verb);
        }
    }

    /**
     * Sends a value, or "size" bytes, "count" times from each of "threads" threads. Of several byte messages each one
     * carries "thread/number" behind the value. With an "errors" argument the outcome of asynchronous messages is
     * told by events.
     */
    private Map<String, String> send(Map<String, String> a) throws Exception {
        Member[] to = to(a);
        int options = Integer.decode(a.get("options"));
        int count = Integer.parseInt(a.getOrDefault("count", "1"));
        int threads = Integer.parseInt(a.getOrDefault("threads", "1"));
        Serializable value = Values.read(a.get("value"));
        int size = Integer.parseInt(a.getOrDefault("size", "0"));
        ErrorHandler handler = !a.containsKey("errors") ? null : new ErrorHandler() {
            @Override
            public void handleError(ChannelException x, UniqueId id) {
                Map<String, String> r = new LinkedHashMap<>();
                faults(x, r);
                Peer.event("failed", "node", name, "id", Values.hex(id.getBytes()), "faults", r.get("faults"));
            }

            @Override
            public void handleCompletion(UniqueId id) {
                Peer.event("completed", "node", name, "id", Values.hex(id.getBytes()));
            }
        };
        if (count == 1 && threads == 1) {
            if (size > 0) {
                value = new ByteMessage(fill(((ByteMessage) value).getMessage(), size));
            }
            UniqueId id = channel.send(to, value, options, handler);
            return result("id", Values.hex(id.getBytes()), "digest",
                    value instanceof ByteMessage ? digest(((ByteMessage) value).getMessage()) : "");
        }
        byte[] prefix = ((ByteMessage) value).getMessage();
        AtomicReference<Exception> failed = new AtomicReference<>();
        List<Thread> all = new ArrayList<>();
        for (int t = 0; t < threads; t++) {
            int number = t;
            Thread th = new Thread(() -> {
                try {
                    for (int i = 0; i < count && failed.get() == null; i++) {
                        byte[] tail = Values.latin(number + "/" + i);
                        byte[] b = Arrays.copyOf(prefix, prefix.length + tail.length);
                        System.arraycopy(tail, 0, b, prefix.length, tail.length);
                        channel.send(to, new ByteMessage(size > 0 ? fill(b, size) : b), options, handler);
                    }
                } catch (Exception e) {
                    failed.compareAndSet(null, e);
                }
            }, "sender " + t);
            all.add(th);
            th.start();
        }
        for (Thread t : all) {
            t.join();
        }
        if (failed.get() != null) {
            throw failed.get();
        }
        return result();
    }

    /** The head, and after it bytes that do not compress well, up to size; the test makes the same ones. */
    private static byte[] fill(byte[] head, int size) {
        byte[] b = Arrays.copyOf(head, Math.max(size, head.length));
        int x = 1;
        for (int i = head.length; i < b.length; i++) {
            x = x * 1103515245 + 12345;
            b[i] = (byte) (x >>> 16);
        }
        return b;
    }

    private Map<String, String> rpcOpen(Map<String, String> a) {
        String id = a.get("rpc");
        String tag = a.getOrDefault("tag", "");
        RpcChannel r = new RpcChannel(Values.latin(id), channel, new RpcCallback() {
            @Override
            public Serializable replyRequest(Serializable msg, Member from) {
                Peer.event("request", "node", name, "rpc", id, "from", Values.hex(from.getUniqueId()), "value",
                        Values.write(msg));
                if ("nothing".equals(msg)) {
                    return null;
                }
                if ("late".equals(msg)) {
                    try {
                        Thread.sleep(Long.parseLong(a.getOrDefault("late", "3000")));
                    } catch (InterruptedException e) {
                        Thread.currentThread().interrupt();
                    }
                }
                return tag.isEmpty() ? msg : new ArrayList<Object>(Arrays.asList(tag, msg));
            }

            @Override
            public void leftOver(Serializable msg, Member from) {
                Peer.event("leftover", "node", name, "rpc", id, "from", Values.hex(from.getUniqueId()), "value",
                        Values.write(msg));
            }
        });
        r.setReplyMessageOptions(Integer.decode(a.getOrDefault("replyOptions", "0")));
        RpcChannel old = rpcs.put(id, r);
        if (old != null) {
            old.breakdown();
        }
        return result();
    }

    private Map<String, String> rpc(Map<String, String> a) throws Exception {
        int mode;
        switch (a.get("mode")) {
            case "first":
                mode = RpcChannel.FIRST_REPLY;
                break;
            case "majority":
                mode = RpcChannel.MAJORITY_REPLY;
                break;
            case "all":
                mode = RpcChannel.ALL_REPLY;
                break;
            default:
                mode = RpcChannel.NO_REPLY;
        }
        Response[] rs = rpcs.get(a.get("rpc")).send(to(a), Values.read(a.get("value")), mode,
                Integer.decode(a.get("options")), Long.parseLong(a.get("timeout")));
        Map<String, String> r = new LinkedHashMap<>();
        r.put("count", String.valueOf(rs.length));
        for (int i = 0; i < rs.length; i++) {
            r.put("from" + i, Values.hex(rs[i].getSource().getUniqueId()));
            r.put("value" + i, Values.write(rs[i].getMessage()));
        }
        return r;
    }

    private Map<String, String> mapOpen(Map<String, String> a) {
        String id = a.get("map");
        long timeout = Long.parseLong(a.getOrDefault("timeout", "15000"));
        AbstractReplicatedMap.MapOwner owner = new AbstractReplicatedMap.MapOwner() {
            @Override
            public void objectMadePrimary(Object key, Object value) {
                Peer.event("primary", "node", name, "map", id, "key", Values.write(key), "value", Values.write(value));
            }
        };
        AbstractReplicatedMap<Object, Object> m = a.get("kind").equals("lazy")
                ? new LazyReplicatedMap<>(owner, channel, timeout, id, null)
                : new ReplicatedMap<>(owner, channel, timeout, id, null);
        m.setAccessTimeout(timeout);
        if (a.containsKey("options")) {
            m.setChannelSendOptions(Integer.decode(a.get("options")));
        }
        maps.put(id, m);
        return result();
    }

    private Map<String, String> map(String verb, AbstractReplicatedMap<Object, Object> m, Map<String, String> a) {
        Object key = a.containsKey("key") ? Values.read(a.get("key")) : null;
        switch (verb) {
            case "put":
                return result("value", Values.write(m.put(key, Values.read(a.get("value")))));
            case "get":
                return result("value", Values.write(m.get(key)));
            case "remove":
                return result("value", Values.write(m.remove(key)));
            case "replicate":
                m.replicate(key, Boolean.parseBoolean(a.getOrDefault("complete", "true")));
                return result();
            case "entry": {
                AbstractReplicatedMap.MapEntry<Object, Object> e = m.getInternal(key);
                if (e == null) {
                    return result("kind", "");
                }
                StringBuilder b = new StringBuilder();
                if (e.getBackupNodes() != null) {
                    for (Member n : e.getBackupNodes()) {
                        b.append(b.length() == 0 ? "" : ",").append(Values.hex(n.getUniqueId()));
                    }
                }
                return result("kind",
                        e.isPrimary() ? "primary" : e.isBackup() ? "backup" : e.isProxy() ? "proxy" : "copy", "primary",
                        e.getPrimary() == null ? "" : Values.hex(e.getPrimary().getUniqueId()), "backups", b.toString(),
                        "value", Values.write(e.getValue()));
            }
            case "sizes":
                return result("size", String.valueOf(m.size()), "full", String.valueOf(m.sizeFull()));
            case "mapMembers": {
                StringBuilder b = new StringBuilder();
                for (Member n : m.getMapMembers()) {
                    b.append(b.length() == 0 ? "" : ",").append(Values.hex(n.getUniqueId()));
                }
                return result("members", b.toString());
            }
            case "mapClose":
                m.breakdown();
                maps.values().remove(m);
                return result();
            default:
                throw new IllegalArgumentException("no verb " + verb);
        }
    }
}
