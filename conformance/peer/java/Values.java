import java.io.Serializable;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Date;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import org.apache.catalina.tribes.ByteMessage;

/**
 * Objects as text, for the lines between a test and this program.
 *
 * <pre>
 * N null            Z0; Z1; Boolean     I5; Integer    J5; Long      D1.5; Double    T5; Date (ms)
 * S4:text String    B4:00ff0a7f byte[]  M4:00ff ByteMessage           (the number counts the characters that follow)
 * L2; two values ArrayList              H1; key value HashMap
 * </pre>
 */
final class Values {
    private final String text;
    private int at;

    private Values(String text) {
        this.text = text;
    }

    static Serializable read(String s) {
        Values v = new Values(s);
        Object o = v.next();
        if (v.at != s.length()) {
            throw new IllegalArgumentException("more than one value in " + s);
        }
        return (Serializable) o;
    }

    private String until(char end) {
        int i = text.indexOf(end, at);
        String s = text.substring(at, i);
        at = i + 1;
        return s;
    }

    private String counted() {
        int n = Integer.parseInt(until(':'));
        String s = text.substring(at, at + n);
        at += n;
        return s;
    }

    private Object next() {
        char type = text.charAt(at++);
        switch (type) {
            case 'N':
                return null;
            case 'Z':
                return Boolean.valueOf(until(';').equals("1"));
            case 'I':
                return Integer.valueOf(until(';'));
            case 'J':
                return Long.valueOf(until(';'));
            case 'D':
                return Double.valueOf(until(';'));
            case 'T':
                return new Date(Long.parseLong(until(';')));
            case 'S':
                return counted();
            case 'B':
                return unhex(counted());
            case 'M':
                return new ByteMessage(unhex(counted()));
            case 'L': {
                int n = Integer.parseInt(until(';'));
                List<Object> l = new ArrayList<>();
                for (int i = 0; i < n; i++) {
                    l.add(next());
                }
                return l;
            }
            case 'H': {
                int n = Integer.parseInt(until(';'));
                Map<Object, Object> m = new HashMap<>();
                for (int i = 0; i < n; i++) {
                    Object k = next();
                    m.put(k, next());
                }
                return m;
            }
            default:
                throw new IllegalArgumentException("no value starts with " + type);
        }
    }

    static String write(Object o) {
        StringBuilder b = new StringBuilder();
        write(b, o);
        return b.toString();
    }

    private static void write(StringBuilder b, Object o) {
        if (o == null) {
            b.append('N');
        } else if (o instanceof Boolean) {
            b.append('Z').append((Boolean) o ? 1 : 0).append(';');
        } else if (o instanceof Integer) {
            b.append('I').append(o).append(';');
        } else if (o instanceof Long) {
            b.append('J').append(o).append(';');
        } else if (o instanceof Double) {
            b.append('D').append(o).append(';');
        } else if (o instanceof Date) {
            b.append('T').append(((Date) o).getTime()).append(';');
        } else if (o instanceof byte[]) {
            counted(b, 'B', hex((byte[]) o));
        } else if (o instanceof ByteMessage) {
            counted(b, 'M', hex(((ByteMessage) o).getMessage()));
        } else if (o instanceof List) {
            b.append('L').append(((List<?>) o).size()).append(';');
            for (Object e : (List<?>) o) {
                write(b, e);
            }
        } else if (o instanceof Map) {
            b.append('H').append(((Map<?, ?>) o).size()).append(';');
            for (Map.Entry<?, ?> e : ((Map<?, ?>) o).entrySet()) {
                write(b, e.getKey());
                write(b, e.getValue());
            }
        } else if (o instanceof String) {
            counted(b, 'S', (String) o);
        } else {
            counted(b, 'O', o.getClass().getName() + " " + o);
        }
    }

    private static void counted(StringBuilder b, char type, String s) {
        b.append(type).append(s.length()).append(':').append(s);
    }

    static String hex(byte[] b) {
        if (b == null || b.length == 0) {
            return "";
        }
        char[] c = new char[2 * b.length];
        for (int i = 0; i < b.length; i++) {
            c[2 * i] = Character.forDigit((b[i] >> 4) & 15, 16);
            c[2 * i + 1] = Character.forDigit(b[i] & 15, 16);
        }
        return new String(c);
    }

    static byte[] unhex(String s) {
        byte[] b = new byte[s.length() / 2];
        for (int i = 0; i < b.length; i++) {
            b[i] = (byte) Integer.parseInt(s.substring(2 * i, 2 * i + 2), 16);
        }
        return b;
    }

    static byte[] latin(String s) {
        return s.getBytes(StandardCharsets.ISO_8859_1);
    }
}
