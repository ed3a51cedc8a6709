import java.io.Serializable;
import java.math.BigDecimal;
import java.math.BigInteger;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collection;
import java.util.Collections;
import java.util.Date;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Hashtable;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.LinkedList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.Stack;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.UUID;
import java.util.Vector;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.TimeUnit;
import org.apache.catalina.tribes.ByteMessage;

/** One object of every kind that applications usually keep in a session. */
final class Samples {
    private static final Map<String, Serializable> ALL = make();

    private Samples() {
    }

    static Map<String, Serializable> all() {
        return ALL;
    }

    private static Map<String, Serializable> make() {
        Map<String, Serializable> m = new LinkedHashMap<>();
        m.put("string", "plain");
        m.put("string-empty", "");
        m.put("string-unicode", "n\u0000\u00fc\u20ac\uD83D\uDE00");
        m.put("string-long", "x".repeat(70_000));
        m.put("boolean", Boolean.TRUE);
        m.put("byte", (byte) -7);
        m.put("short", (short) -700);
        m.put("char", '\u20ac');
        m.put("integer", 1_000_000_007);
        m.put("integer-small", 7);
        m.put("long", -1L << 60);
        m.put("float", 1.5f);
        m.put("double", Math.PI);
        m.put("double-nan", Double.NaN);
        m.put("bytes", new byte[] { 1, 2, 3, -1 });
        m.put("ints", new int[] { 1, -2, 3 });
        m.put("longs", new long[] { Long.MIN_VALUE, 0, Long.MAX_VALUE });
        m.put("doubles", new double[] { 0.5, -0.0 });
        m.put("booleans", new boolean[] { true, false });
        m.put("chars", new char[] { 'a', '\uffff' });
        m.put("strings", new String[] { "a", null, "b", "a" });
        m.put("objects", new Object[] { "a", 5, null, new int[] { 1 } });
        m.put("matrix", new int[][] { { 1 }, { 2, 3 }, {} });
        m.put("date", new Date(1_600_000_000_123L));
        m.put("uuid", new UUID(0x0123456789abcdefL, 0xfedcba9876543210L));
        m.put("big-integer", BigInteger.ONE.negate().shiftLeft(200));
        m.put("big-integer-zero", BigInteger.ZERO);
        m.put("big-decimal", new BigDecimal("-12345678901234567890.0123"));
        m.put("locale", Locale.GERMANY);
        m.put("enum", TimeUnit.SECONDS);
        m.put("builder", new StringBuilder("built"));
        m.put("buffer", new StringBuffer("buffered"));
        List<Object> l = Arrays.asList("a", 1, null, "a", new Date(5), 2L);
        m.put("array-list", new ArrayList<>(l));
        m.put("array-list-empty", new ArrayList<>());
        m.put("linked-list", new LinkedList<>(l));
        m.put("vector", new Vector<>(l));
        Stack<Object> stack = new Stack<>();
        stack.addAll(l);
        m.put("stack", stack);
        m.put("array-deque", new ArrayDeque<>(Arrays.asList(1, 2, 3)));
        m.put("arrays-as-list", (Serializable) l);
        m.put("empty-list", (Serializable) Collections.emptyList());
        m.put("list-of", (Serializable) List.of("a", 2, 3L));
        m.put("set-of", (Serializable) Set.of("only"));
        m.put("map-of", (Serializable) Map.of("k", "v"));
        m.put("hash-set", new HashSet<>(l));
        m.put("linked-hash-set", new LinkedHashSet<>(l));
        m.put("tree-set", new TreeSet<>(Arrays.asList("b", "a", "c")));
        Map<String, Object> h = new HashMap<>();
        for (int i = 0; i < 20; i++) {
            h.put("key " + i, i);
        }
        h.put(null, null);
        m.put("hash-map", (Serializable) h);
        LinkedHashMap<Object, Object> lh = new LinkedHashMap<>();
        lh.put("z", 1);
        lh.put("a", new ArrayList<>(l));
        m.put("linked-hash-map", lh);
        m.put("tree-map", new TreeMap<>(Map.of("b", 1, "a", 2)));
        m.put("hashtable", new Hashtable<>(Map.of("b", 1, "a", 2)));
        m.put("concurrent-hash-map", new ConcurrentHashMap<>(Map.of("b", 1, "a", 2)));
        m.put("byte-message", new ArrayList<>(List.of(new ByteMessage(new byte[] { 5, 6 }))));
        ArrayList<Object> deep = new ArrayList<>();
        for (int i = 0; i < 30; i++) {
            ArrayList<Object> outer = new ArrayList<>();
            outer.add(deep);
            outer.add("level " + i);
            deep = outer;
        }
        m.put("deep", deep);
        String shared = new String("shared");
        m.put("shared", new ArrayList<>(Arrays.asList(shared, new ArrayList<>(List.of(shared)), shared)));
        return m;
    }

    /** The names of all samples of o's class that are equal to it. */
    static String names(Object o) {
        StringBuilder b = new StringBuilder();
        for (Map.Entry<String, Serializable> e : ALL.entrySet()) {
            if (o != null && o.getClass() == e.getValue().getClass() && same(o, e.getValue())) {
                b.append(b.length() == 0 ? "" : ",").append(e.getKey());
            }
        }
        return b.toString();
    }

    private static boolean same(Object a, Object b) {
        if (a instanceof CharSequence) {
            return a.toString().equals(b.toString());
        }
        if (a instanceof ArrayDeque || a instanceof ArrayList) {
            Object[] x = ((Collection<?>) a).toArray();
            Object[] y = ((Collection<?>) b).toArray();
            if (x.length != y.length) {
                return false;
            }
            for (int i = 0; i < x.length; i++) {
                boolean message = x[i] instanceof ByteMessage && y[i] instanceof ByteMessage;
                if (message ? !Arrays.equals(((ByteMessage) x[i]).getMessage(), ((ByteMessage) y[i]).getMessage())
                        : !Arrays.deepEquals(new Object[] { x[i] }, new Object[] { y[i] })) {
                    return false;
                }
            }
            return true;
        }
        return Arrays.deepEquals(new Object[] { a }, new Object[] { b });
    }
}
