import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.lang.reflect.InvocationTargetException;
import java.net.URLDecoder;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.logging.Handler;
import java.util.logging.Level;
import java.util.logging.LogRecord;
import java.util.logging.Logger;

/**
 * A program that a test drives: Tribes nodes by the names the test gives them. A line on standard input is
 * <pre>number verb key=value&amp;key=value</pre>
 * with the values URL-encoded. Each line is answered by one line on standard output, <pre>= number key=value…</pre> or
 * <pre>- number error=…</pre> in any order: lines are worked on side by side. What happens meanwhile is told by lines
 * <pre>! key=value…</pre> The program ends when standard input does, so it cannot outlive its test.
 */
public final class Peer {
    private static final LinkedBlockingQueue<String> OUT = new LinkedBlockingQueue<>();
    private static final ConcurrentHashMap<String, Node> NODES = new ConcurrentHashMap<>();
    private static final ExecutorService WORK = Executors.newCachedThreadPool(r -> {
        Thread t = new Thread(r, "command");
        t.setDaemon(true);
        return t;
    });

    private Peer() {
    }

    public static void main(String[] args) throws Exception {
        PrintStream out = new PrintStream(System.out, false, "US-ASCII");
        System.setOut(System.err); // a library that prints must not get between our lines
        Thread writer = new Thread(() -> write(out), "writer");
        writer.setDaemon(true);
        writer.start();
        logs();
        event("ready", "version", version(), "java", System.getProperty("java.version"));
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII));
        for (String line; (line = in.readLine()) != null;) {
            String[] p = line.split(" ", 3);
            Map<String, String> a = decode(p.length > 2 ? p[2] : "");
            WORK.execute(() -> work(p[0], p[1], a));
        }
        Runtime.getRuntime().halt(0);
    }

    private static String version() {
        String v = org.apache.catalina.tribes.Channel.class.getPackage().getImplementationVersion();
        return v == null ? "unknown" : v;
    }

    private static void work(String number, String verb, Map<String, String> a) {
        try {
            OUT.add("= " + number + " " + encode(run(verb, a)));
        } catch (Throwable e) {
            Map<String, String> r = new LinkedHashMap<>();
            Throwable t = e instanceof InvocationTargetException ? e.getCause() : e;
            r.put("error", t.getClass().getSimpleName() + ": " + t.getMessage());
            Node.faults(t, r);
            OUT.add("- " + number + " " + encode(r));
        }
    }

    private static Map<String, String> run(String verb, Map<String, String> a) throws Exception {
        String name = a.get("node");
        switch (verb) {
            case "open": {
                Node n = new Node(name, a);
                NODES.put(name, n);
                try {
                    return n.start();
                } catch (Exception e) {
                    NODES.remove(name);
                    throw e;
                }
            }
            case "close":
                return NODES.remove(name).stop();
            case "webOpen":
                return web("open", a);
            case "webClose":
                return web("close", a);
            case "exit":
                Runtime.getRuntime().halt(0);
                return null;
            default:
                Node n = NODES.get(name);
                if (n == null) {
                    throw new IllegalArgumentException("no node " + name);
                }
                return n.run(verb, a);
        }
    }

    @SuppressWarnings("unchecked")
    private static Map<String, String> web(String method, Map<String, String> a) throws Exception {
        return (Map<String, String>) Class.forName("Web").getMethod(method, Map.class).invoke(null, a);
    }

    /** Tells the test something; key and value alternate. */
    static void event(String kind, String... kv) {
        Map<String, String> m = new LinkedHashMap<>();
        m.put("event", kind);
        for (int i = 0; i < kv.length; i += 2) {
            m.put(kv[i], kv[i + 1] == null ? "" : kv[i + 1]);
        }
        OUT.add("! " + encode(m));
    }

    private static void write(PrintStream out) {
        try {
            for (;;) {
                out.println(OUT.take());
                if (OUT.isEmpty()) {
                    out.flush();
                    if (out.checkError()) {
                        Runtime.getRuntime().halt(0);
                    }
                }
            }
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }

    /** Everything that Tribes logs from INFO upwards becomes an event. */
    private static void logs() {
        Logger root = Logger.getLogger("");
        for (Handler h : root.getHandlers()) {
            root.removeHandler(h);
        }
        root.setLevel(Level.INFO);
        root.addHandler(new Handler() {
            @Override
            public void publish(LogRecord r) {
                StringWriter trace = new StringWriter();
                if (r.getThrown() != null) {
                    r.getThrown().printStackTrace(new PrintWriter(trace));
                }
                event("log", "level", r.getLevel().getName(), "logger", String.valueOf(r.getLoggerName()), "text",
                        String.valueOf(r.getMessage()), "trace", trace.toString());
            }

            @Override
            public void flush() {
                // nothing is held
            }

            @Override
            public void close() {
                // nothing to close
            }
        });
    }

    static String encode(Map<String, String> m) {
        StringBuilder b = new StringBuilder();
        for (Map.Entry<String, String> e : m.entrySet()) {
            b.append(b.length() == 0 ? "" : "&").append(e.getKey()).append('=').append(
                    URLEncoder.encode(e.getValue(), StandardCharsets.UTF_8));
        }
        return b.toString();
    }

    private static Map<String, String> decode(String s) {
        Map<String, String> m = new LinkedHashMap<>();
        for (String kv : s.split("&")) {
            int i = kv.indexOf('=');
            if (i > 0) {
                m.put(kv.substring(0, i), URLDecoder.decode(kv.substring(i + 1), StandardCharsets.UTF_8));
            }
        }
        return m;
    }
}
