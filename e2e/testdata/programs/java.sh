# The compiler, many threads, a server and its client, and memory that is collected.
mkdir -p /tmp/java && cd /tmp/java
cat >Tried.java <<'end'
import com.sun.net.httpserver.HttpServer;
import java.net.*;
import java.net.http.*;
import java.util.concurrent.*;
import java.util.stream.*;

public class Tried {
  public static void main(String[] args) throws Exception {
    var server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
    server.createContext("/", x -> { x.sendResponseHeaders(200, 2); x.getResponseBody().write("ok".getBytes()); x.close(); });
    server.setExecutor(Executors.newFixedThreadPool(8));
    server.start();
    var client = HttpClient.newHttpClient();
    var uri = URI.create("http://127.0.0.1:" + server.getAddress().getPort() + "/");
    var pool = Executors.newFixedThreadPool(16);
    var calls = IntStream.range(0, 200).mapToObj(i -> pool.submit(() ->
      client.send(HttpRequest.newBuilder(uri).build(), HttpResponse.BodyHandlers.ofString()).body())).collect(Collectors.toList());
    int good = 0;
    for (var c : calls) if (c.get().equals("ok")) good++;
    long bytes = 0;
    for (int i = 0; i < 2000; i++) bytes += new byte[1 << 20].length;
    System.out.println(good + " " + (bytes >> 20));
    System.exit(0);
  }
}
end
javac Tried.java
java -Xmx256m Tried | grep '^200 2000$'
