import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** Sends a task and two more requests with Java's own client, and prints the statuses. Arguments: URL, key, body. */
public class HttpClientCalls {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        HttpRequest task = HttpRequest.newBuilder(URI.create(arguments[0] + "/api/v1/task"))
            .header("Authorization", "Bearer " + arguments[1])
            .header("Content-Type", "application/json")
            .POST(HttpRequest.BodyPublishers.ofString(arguments[2]))
            .build();
        HttpRequest account = HttpRequest.newBuilder(URI.create(arguments[0] + "/api/v1/account"))
            .header("Authorization", "Bearer " + arguments[1])
            .build();
        for (HttpRequest request : new HttpRequest[] {task, account, task}) {
            HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.version());
        }
    }
}
