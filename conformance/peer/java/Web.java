import jakarta.servlet.http.HttpServlet;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import jakarta.servlet.http.HttpSession;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import org.apache.catalina.Context;
import org.apache.catalina.Engine;
import org.apache.catalina.core.StandardContext;
import org.apache.catalina.ha.session.BackupManager;
import org.apache.catalina.ha.session.DeltaManager;
import org.apache.catalina.ha.tcp.SimpleTcpCluster;
import org.apache.catalina.startup.Tomcat;
import org.apache.catalina.tribes.group.GroupChannel;
import org.apache.catalina.tribes.group.interceptors.MessageDispatchInterceptor;
import org.apache.catalina.tribes.group.interceptors.TcpFailureDetector;
import org.apache.catalina.tribes.membership.McastService;
import org.apache.catalina.tribes.transport.nio.NioReceiver;

/** A whole Tomcat with a cluster in its engine and a distributable application that keeps what it is told. */
public final class Web {
    private static final Map<String, Web> ALL = new ConcurrentHashMap<>();

    private final Tomcat tomcat = new Tomcat();
    private final GroupChannel channel = new GroupChannel();

    private Web(Map<String, String> a) throws Exception {
        tomcat.setBaseDir(a.get("dir"));
        tomcat.setHostname("localhost");
        tomcat.setPort(0);
        Engine engine = tomcat.getEngine();
        engine.setName(a.get("node"));
        engine.setJvmRoute(a.get("route"));
        engine.setDefaultHost("localhost");
        tomcat.getHost(); // now, since the engine's name is part of what it registers
        tomcat.getConnector().setProperty("address", "127.0.0.1");
        tomcat.getConnector().setProperty("maxKeepAliveRequests", "-1"); // or who measures it measures connections

        McastService m = new McastService();
        m.setAddress(a.get("group"));
        m.setPort(Integer.parseInt(a.get("groupPort")));
        m.setBind("127.0.0.1");
        m.setFrequency(Long.parseLong(a.getOrDefault("frequency", "500")));
        m.setDropTime(Long.parseLong(a.getOrDefault("dropTime", "3000")));
        channel.setMembershipService(m);
        NioReceiver r = (NioReceiver) channel.getChannelReceiver();
        r.setAddress("127.0.0.1");
        r.setPort(Integer.parseInt(a.get("port")));
        channel.addInterceptor(new MessageDispatchInterceptor());
        channel.addInterceptor(new TcpFailureDetector());

        SimpleTcpCluster cluster = new SimpleTcpCluster();
        cluster.setChannel(channel);
        cluster.setChannelSendOptions(Integer.decode(a.getOrDefault("options", "8")));
        if (a.getOrDefault("manager", "delta").equals("backup")) {
            BackupManager b = new BackupManager();
            b.setMapSendOptions(Integer.decode(a.getOrDefault("mapOptions", "6")));
            cluster.setManagerTemplate(b);
        } else {
            DeltaManager d = new DeltaManager();
            d.setNotifySessionListenersOnReplication(true);
            cluster.setManagerTemplate(d);
        }
        engine.setCluster(cluster);

        Context c = tomcat.addContext("/app", a.get("dir"));
        ((StandardContext) c).setDistributable(true);
        Tomcat.addServlet(c, "app", new App());
        c.addServletMappingDecoded("/*", "app");
        Tomcat.addServlet(c, "demo", new Demo());
        for (String path : new String[] {"/plain", "/read", "/write"}) {
            c.addServletMappingDecoded(path, "demo");
        }
    }

    /** Does what the demo application of Longhouse does under these paths. */
    private static final class Demo extends HttpServlet {
        private static final long serialVersionUID = 1L;

        @Override
        protected void doGet(HttpServletRequest q, HttpServletResponse p) throws IOException {
            String text = "ok";
            String path = q.getServletPath();
            if (!path.equals("/plain")) {
                HttpSession s = q.getSession();
                Long n = (Long) s.getAttribute("n");
                n = n == null ? 0L : n;
                if (path.equals("/write")) {
                    n = n + 1;
                    String size = q.getParameter("size");
                    s.setAttribute("n", n);
                    s.setAttribute("blob", new byte[size == null ? 100 : Integer.parseInt(size)]);
                }
                text = n.toString();
            }
            p.setContentType("text/plain;charset=utf-8");
            p.setContentLength(text.length());
            p.getOutputStream().write(text.getBytes(StandardCharsets.US_ASCII));
        }
    }

    /** Answers "id value": of the attribute "name", which it sets first when there is a "value". */
    private static final class App extends HttpServlet {
        private static final long serialVersionUID = 1L;

        @Override
        protected void doGet(HttpServletRequest q, HttpServletResponse p) throws IOException {
            String name = q.getParameter("name");
            String value = q.getParameter("value");
            HttpSession s = q.getSession(value != null);
            if (s == null) {
                p.getWriter().print("none");
                return;
            }
            if (value != null) {
                s.setAttribute(name, value);
            }
            if (q.getParameter("invalidate") != null) {
                s.invalidate();
                p.getWriter().print("gone");
                return;
            }
            p.getWriter().print(s.getId() + " " + s.getAttribute(name));
        }
    }

    /** Called by Peer, by name: not every machine has all of Tomcat's jars. */
    public static Map<String, String> open(Map<String, String> a) throws Exception {
        Web w = new Web(a);
        w.tomcat.start();
        ALL.put(a.get("node"), w);
        Map<String, String> r = new LinkedHashMap<>();
        r.put("http", String.valueOf(w.tomcat.getConnector().getLocalPort()));
        r.put("id", Values.hex(w.channel.getLocalMember(false).getUniqueId()));
        return r;
    }

    /** Called by Peer, by name. */
    public static Map<String, String> close(Map<String, String> a) throws Exception {
        Web w = ALL.remove(a.get("node"));
        w.tomcat.stop();
        w.tomcat.destroy();
        return new LinkedHashMap<>();
    }
}
